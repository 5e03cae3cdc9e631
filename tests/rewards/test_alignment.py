from drl_toolkit.utils.images import to_pil, to_tensor

"SigLIP, captions and questions against transformers' and torchmetrics' own results, on tiny random models."
import pytest, tiny_models, torch
from PIL import Image

from drl_toolkit.emoji import world
from drl_toolkit.rewards.alignment import (
    Viewer,
    answers_reward,
    bertscore_recall,
    caption_reward,
    load_dual_encoder,
    load_text_encoder,
    nearest_caption,
    question_reward,
    siglip_reward,
)

IMAGES, PROMPTS = (
    torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    ['a cat', 'a dog above a cat', 'an apple'],
)


def test_siglip_is_transformers_own_logit(tmp_path):
    r = siglip_reward(tiny_models.save_siglip(tmp_path))
    net, process = load_dual_encoder(str(tmp_path))
    with torch.no_grad():
        theirs = net(
            **process(
                images=to_pil(IMAGES), text=PROMPTS, padding='max_length', max_length=16, return_tensors='pt'
            )
        ).logits_per_image.diagonal()
    assert torch.allclose(r(IMAGES, PROMPTS), theirs, atol=0.02) and theirs.std() > 0.05


def test_bertscore_recall_is_the_greedy_matching_by_hand(tmp_path):
    """As in bert_score: special tokens of the reference have no weight, those of the candidate may be
    matched; one text at a time, without padding."""
    net, tok = load_text_encoder(str(tiny_models.save_bert(tmp_path)))
    said, asked = (
        ['a cat above a red car', 'a dog', 'three stars', 'a strawberry'],
        ['a cat', 'a dog', 'a red car above a cat', 'an apple'],
    )

    def by_hand(a, b, ends=slice(None)):
        x, y = (
            torch.nn.functional.normalize(net(**tok(t, return_tensors='pt')).last_hidden_state[0], dim=-1)
            for t in (a, b)
        )
        return sum(max((w @ v).item() for v in x[ends]) for w in y[1:-1]) / (len(y) - 2)

    together = bertscore_recall(said, asked, net, tok)
    assert together.tolist() == pytest.approx(
        [by_hand(a, b) for a, b in zip(said, asked)], abs=1e-5
    ) and together[1] == pytest.approx(1, abs=1e-5)
    assert all(
        r >= by_hand(a, b, slice(1, -1)) - 1e-5 for r, a, b in zip(together.tolist(), said, asked)
    )  # never below the matching of words alone
    assert bertscore_recall(['', 'a cat'], ['a cat', 'a cat'], net, tok)[0] == 0
    with pytest.raises(ValueError, match='layer must be -1 to 2 .*; got 7'):
        bertscore_recall(said, asked, net, tok, layer=7)


def test_the_nearest_caption_is_the_drawn_one():
    texts, rng = ['an apple', 'a bus', 'three stars'], __import__('random').Random(0)
    images = to_tensor([world.draw(world.compose(world.parse(p), rng)) for p in texts])
    assert nearest_caption(texts)(images) == texts


@pytest.mark.parametrize('save', [tiny_models.save_blip, tiny_models.save_llava])
def test_a_viewer_describes_with_and_without_a_chat_format(tmp_path, save):
    viewer = Viewer(save(tmp_path), longest=5)
    asked = viewer.inputs(IMAGES, ['a picture of'] * 3)
    with torch.no_grad():
        ids = viewer.model.generate(**asked, do_sample=False, max_new_tokens=5)
    answers = viewer.processor.tokenizer.batch_decode(ids[:, -5:], skip_special_tokens=True)
    assert all(
        reply and answer.endswith(reply)
        for reply, answer in zip(viewer.reply(IMAGES, ['a picture of'] * 3), answers)
    )  # not the question
    together, alone = viewer.caption(IMAGES), [viewer.caption(IMAGES[i : i + 1])[0] for i in range(3)]
    assert together == alone and len(together) == 3


def test_caption_reward_with_a_model_and_its_template(tmp_path_factory):
    blip, bert = (
        tiny_models.save_blip(tmp_path_factory.mktemp('blip')),
        tiny_models.save_bert(tmp_path_factory.mktemp('bert')),
    )
    r = caption_reward(blip, bert, layer=-1, reference='a picture of {prompt}')
    assert torch.equal(r(IMAGES, PROMPTS), r(IMAGES, PROMPTS)) and r.card.model.startswith(str(blip))
    told = caption_reward(lambda images: ['a cat'] * len(images), bert, layer=-1, reference='{prompt}')(
        IMAGES, PROMPTS
    )
    assert told[0] == pytest.approx(1, abs=1e-5) and told[1:].max() < 1
    with pytest.raises(ValueError, match="should contain '{prompt}'"):
        caption_reward(reference='x')
    with pytest.raises(ValueError, match='1 captions for 3 images'):
        caption_reward(lambda images: ['a cat'], bert, layer=-1)(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match='texts must be one caption or more'):
        nearest_caption([])


def test_question_is_the_softmax_of_two_tokens(tmp_path):
    folder = tiny_models.save_llava(tmp_path)
    r, viewer = question_reward(folder), Viewer(folder)
    question = ['Does this picture show a cat? Answer yes or no.'] * 3
    with torch.no_grad():
        logits = viewer.model(**viewer.inputs(IMAGES, question)).logits[:, -1]
    assert torch.allclose(
        r(IMAGES, ['a cat'] * 3), logits[:, [8, 9]].softmax(1)[:, 0], atol=1e-5
    )  # 'yes' and 'no' are tokens 8 and 9
    mixed, alone = r(IMAGES, PROMPTS), torch.cat([r(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert torch.allclose(mixed, alone, atol=1e-5)  # longer questions beside it do not matter
    leaf = (IMAGES * 1.2 - 0.1).requires_grad_()
    r.score(leaf, PROMPTS).sum().backward()
    assert (leaf.grad.abs().amax((1, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match="should contain '{prompt}'"):
        question_reward(folder, 'Is it good?')


def test_a_tokenizer_without_yes_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not tell 'yes' from 'no'"):
        question_reward(tiny_models.save_llava(tmp_path, 'a cat'))(IMAGES[:1], ['a cat'])


def test_answers_are_counted():
    questions = lambda p: [('What?', p.split()[-1]), ('Many?', 'one')] if p != 'empty' else []
    r = answers_reward(questions, lambda images, qs: ['A CAT.', 'There are one or two.'])
    assert r(IMAGES, PROMPTS).tolist() == [1, 1, 0.5]
    with pytest.raises(ValueError, match="no question for the prompt 'empty'"):
        r(IMAGES[:1], ['empty'])


def test_a_captioner_may_see_ddpos_jpegs(tmp_path):
    "Files of quality 80, as PIL writes and reads them."
    bert, seen = tiny_models.save_bert(tmp_path), []
    say = lambda images: seen.append(images) or ['a cat'] * len(images)
    caption_reward(say, bert, layer=-1, jpeg_quality=80)(IMAGES, PROMPTS)
    caption_reward(say, bert, layer=-1)(IMAGES, PROMPTS)
    for image, got in zip(to_pil(IMAGES), to_pil(seen[0])):
        image.save(tmp_path / 'sent.jpg', quality=80)
        assert Image.open(tmp_path / 'sent.jpg').tobytes() == got.tobytes()
    assert torch.equal(seen[1], IMAGES)
    with pytest.raises(ValueError, match='quality must be in 1 … 95; got 99'):
        caption_reward(say, bert, layer=-1, jpeg_quality=99)(IMAGES, PROMPTS)


def test_answers_may_have_to_be_spelt_alike():
    "DDPO's code looks for the answer as it is."
    reply = lambda images, qs: ['A CAT.', 'There are one or two.']
    questions = lambda p: [('What?', 'cat'), ('Many?', 'one')]
    assert answers_reward(questions, reply)(IMAGES, PROMPTS).tolist() == [1, 1, 1]
    assert answers_reward(questions, reply, match_case=True)(IMAGES, PROMPTS).tolist() == [0.5, 0.5, 0.5]
