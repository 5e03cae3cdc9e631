"B²-DiffuRL by hand-made cases: shared prefixes, the paper's schedule, who is kept, and a run of it."

import pytest, torch

from drl_toolkit.algorithms.advantages import Contrastive, group
from drl_toolkit.algorithms.branching import (
    BranchSampler,
    TreeSampler,
    branch_rollout,
    depth_credit,
    nodes,
    trained_steps,
    tree_rollout,
)
from drl_toolkit.sampling.rollout import rollout
from drl_toolkit.sampling.policy import Policy
from drl_toolkit.prompts.task import Task
from drl_toolkit.emoji.tiny import tiny_sd
from drl_toolkit.training.trainer import Trainer
from drl_toolkit.training.config import TrainConfig

PROMPTS, GROUPS = ['a cat'] * 3 + ['a dog'] * 3 + ['a key'] * 2, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])


def policy(**more):
    return Policy(tiny_sd(), num_steps=5, **more)


def test_the_papers_schedule():
    stages = [trained_steps(i, 100, 20) for i in range(100)]
    assert [stages.count(n) for n in range(14, 21)] == [15, 14, 14, 15, 14, 14, 14]
    assert (
        trained_steps(0, 7, 10, first=0.1) == 1
        and trained_steps(6, 7, 10, first=0.1) == 9
        and trained_steps(99, 100, 10) == 10
    )
    assert all(
        1 <= trained_steps(e, n, t, f) <= t
        for n in (1, 3, 50)
        for e in range(n)
        for t in (1, 2, 7)
        for f in (0.1, 0.5, 1.0)
    )


@pytest.mark.parametrize('branching', [1, 2, 5])
def test_a_family_shares_its_prefix_and_nothing_else(branching):
    p = policy()
    traj = branch_rollout(p, PROMPTS, GROUPS, branching, seed=1)
    split = 5 - branching
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7]):
        shared = traj.latents[: split + 1, rows]
        assert torch.equal(shared, shared[:, :1].expand_as(shared)) and torch.equal(
            traj.log_probs[:split, rows], traj.log_probs[:split, rows[:1]].expand(-1, len(rows))
        )
        if branching > 1:
            assert not torch.equal(traj.latents[split + 1, rows[0]], traj.latents[split + 1, rows[1]])
    assert not torch.equal(traj.latents[0, 0], traj.latents[0, 3])
    assert (
        traj.latents.shape == (6, 8, 4, 8, 8)
        and traj.log_probs.shape == (5, 8)
        and traj.images.shape == (8, 3, 64, 64)
    )


@pytest.mark.parametrize('branching', [2, 4])
def test_the_density_is_the_policys_and_batches_do_not_matter(branching):
    p = policy(guidance_scale=2.0)
    traj = branch_rollout(p, PROMPTS, GROUPS, branching, seed=1)
    for size in (1, 4):
        other = branch_rollout(p, PROMPTS, GROUPS, branching, seed=1, batch_size=size)
        assert torch.equal(other.latents, traj.latents) and torch.equal(other.log_probs, traj.log_probs)
    rows = traj.transitions(p.stochastic.nonzero().T.expand(8, -1))
    now = p.transition(rows['latents'], rows['step'], p.encode(PROMPTS)[rows['sample']]).log_prob(
        rows['next_latents']
    )
    assert torch.equal(now.detach(), rows['old_log_prob'])


def test_the_prefix_is_computed_once():
    "Rows of the UNet: (T - s) per family and s per sample, in batches that are filled up to 16 rows."
    p, seen = policy(), []
    prompts, groups = ['a cat'] * 64, torch.arange(64) // 4
    p.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    branch_rollout(p, prompts, groups, 2, batch_size=64)
    assert sum(seen) == 3 * 16 + 2 * 64
    seen.clear()
    rollout(p, prompts)
    assert sum(seen) == 5 * 64


def test_selection_by_hand():
    prompts, groups = ['p'] * 4 + ['q'] * 4, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    rewards = torch.tensor([10.0, 0.0, 6.0, 4.0, 1.0, 1.0, 1.0, 1.0])
    z = (rewards[:4] - 5) / rewards[:4].std()
    credit = Contrastive()(rewards, groups=groups, prompts=prompts)
    assert (
        torch.allclose(credit[:2], z[:2]) and (credit[2:] == 0).all()
    )  # 6 and 4 lie within half a deviation; all of q is equal
    assert (Contrastive(high=0.2, low=-0.2)(rewards, groups=groups, prompts=prompts)[:4] != 0).all()
    only_good = Contrastive(low=-9.0, high=0.5)(rewards, groups=groups, prompts=prompts)
    assert (only_good != 0).tolist() == [True] + [False] * 7


def test_history_is_remembered_per_prompt_and_comes_back():
    c, groups = Contrastive(rounds=2, high=0.0, low=0.0, correction=0), torch.tensor([0, 0])
    first, second = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 4.0])
    c(first, groups=groups, prompts=['p', 'p'])
    known = torch.tensor([3.0, 4.0, 0.0, 1.0])
    again = Contrastive(rounds=2, high=0.0, low=0.0, correction=0)
    again.load_state_dict(c.state_dict())
    for one in (c, again):  # the worse of the second round is still above the mean: it is not blamed
        assert torch.allclose(
            one(second, groups=groups, prompts=['p', 'p']),
            torch.tensor([0.0, (4 - known.mean()) / known.std(correction=0)]),
        )
    for _ in range(5):
        c(second, groups=groups, prompts=['p', 'p'])
    assert len(c.memory['p']) == 2


def test_bs_own_deviation_and_history():
    """By hand: z over this round and the two rounds before it, of the run or of the prompt, with the unbiased
    deviation."""
    groups, p, q = torch.tensor([0, 0]), ['p', 'p'], ['q', 'q']
    rounds = [([0.0, 1.0], p), ([5.0, 9.0], q), ([6.0, 9.0], q), ([3.0, 4.0], p)]
    for history, known in (('run', [3.0, 4.0]), ('prompt', [3.0, 4.0, 0.0, 1.0])):
        c = Contrastive(rounds=2, high=-9.0, low=-9.0, history=history, correction=1)
        for rewards, prompts in rounds:
            last = c(torch.tensor(rewards), groups=groups, prompts=prompts)
            c.load_state_dict(c.state_dict())  # and after a resume
        mean = sum(known) / len(known)
        deviation = (sum((x - mean) ** 2 for x in known) / (len(known) - 1)) ** 0.5
        assert last[1] == pytest.approx((4 - mean) / deviation, rel=1e-6) and last[1] != 0
    assert Contrastive(correction=1)(
        torch.tensor([2.0]), groups=torch.tensor([0]), prompts=['p']
    ).tolist() == [0.0]
    with pytest.raises(ValueError, match="history must be"):
        Contrastive(history='rounds')


def bright(samples=24):
    return Task(
        'bright',
        ['a cat', 'a dog'],
        lambda images, prompts: images.mean((1, 2, 3)),
        group_size=4,
        samples=samples,
        advantage=Contrastive(),
    )


@pytest.mark.parametrize(
    'sampler',
    [BranchSampler(first=0.4), BranchSampler(first=0.4, share_prefix=False), BranchSampler(first=1.0)],
)
def test_a_run_trains_backwards(sampler):
    "The trained part grows, the ratio is 1 at every start, and only kept samples are trained."
    t = Trainer(
        policy(),
        [bright()],
        TrainConfig(epochs=4, train_steps=0, num_minibatches=1, warmup=0, lr=1e-3),
        callbacks=[],
        sampler=sampler,
    )
    able = []
    for n in range(1, 5):
        able.append(t.objective.able(t.context, t.tasks[0]).nonzero().flatten().tolist())
        t.fit(n)
        t.config.epochs = 4
    assert (
        able[-1] == [0, 1, 2, 3]
        and all(set(a) <= set(b) for a, b in zip(able, able[1:]))
        and all(3 in a for a in able)
    )
    assert all(h['tasks']['bright']['ratio_error'] == 0 for h in t.history)


def test_the_schedule_may_be_any_function():
    t = Trainer(
        policy(),
        [bright()],
        TrainConfig(epochs=4, train_steps=0),
        callbacks=[],
        sampler=BranchSampler(schedule=lambda epoch, epochs, num_steps: 2 + epoch),
    )
    assert [t.sampler.steps(t.context) for t.epoch in range(4)] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match=r'schedule must be in 1 … 5 .*got 0 in epoch 0'):
        Trainer(policy(), [bright()], callbacks=[], sampler=BranchSampler(schedule=lambda *_: 0))
    with pytest.raises(ValueError, match='none of the 5 steps can be trained'):
        Trainer(
            policy(),
            [bright()],
            TrainConfig(train_steps=0),
            callbacks=[],
            sampler=BranchSampler(schedule=lambda *_: 1),
        )


def test_nodes_of_trees_by_hand():
    groups = torch.tensor([3] * 4 + [1] * 4)
    assert (
        nodes(groups, 0, 2).tolist() == [0] * 4 + [1] * 4
        and nodes(groups, 1, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        and nodes(groups, 2, 2).tolist() == list(range(8))
    )
    assert nodes(torch.zeros(9), 1, 2).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match='a group has 6 samples'):
        nodes(torch.zeros(6), 0, 2)


def test_a_tree_parts_where_it_should_and_nothing_is_computed_twice():
    p, seen = policy(), []
    hook = p.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    tree_rollout(p, ['a cat'] * 64, torch.arange(64) // 4, (1, 3))
    assert sum(seen) == 1 * 16 + 2 * 32 + 2 * 64  # one step of 16 roots, two of 32 nodes, two of 64 leaves
    hook.remove()
    prompts, groups = ['a cat'] * 4 + ['a dog'] * 4, torch.arange(8) // 4
    tree = tree_rollout(p, prompts, groups, (1, 3), seed=1)
    same = lambda step, a, b: torch.equal(tree.latents[step, a], tree.latents[step, b])
    for step in range(6):  # latents[step] is what step `step` starts from
        assert (
            same(step, 0, 1) == (step <= 3)
            and same(step, 0, 2) == (step <= 1)
            and same(step, 1, 2) == (step <= 1)
            and not same(step, 0, 4)
        )
    assert torch.equal(tree.log_probs[1:3, 0], tree.log_probs[1:3, 1]) and not torch.equal(
        tree.log_probs[1:3, 0], tree.log_probs[1:3, 2]
    )
    again = tree_rollout(
        p, prompts[4:], groups[4:], (1, 3), seed=1, batch_size=2, first=4
    )  # a part of an epoch
    assert torch.equal(again.latents, tree.latents[:, 4:])
    rows = tree.transitions(p.stochastic.nonzero().T.expand(8, -1))
    now = p.transition(rows['latents'], rows['step'], p.encode(prompts)[rows['sample']]).log_prob(
        rows['next_latents']
    )
    assert torch.equal(now.detach(), rows['old_log_prob'])


def test_depth_credit_by_hand():
    leaves, groups = torch.tensor([1.0, 3.0, 4.0, 8.0, 5.0, 5.0, 7.0, 3.0]), torch.arange(8) // 4
    root, middle, leaf = depth_credit(leaves, groups, 2)
    size = leaves[:4].std(correction=0)
    assert (root == 0).all() and torch.allclose(
        middle, size * torch.tensor([-1.0, -1, 1, 1, 0, 0, 0, 0]), atol=1e-6
    )  # both nodes of the second tree are worth 5
    assert torch.allclose(leaf[:4], leaves[:4] - 4, atol=1e-6) and torch.allclose(
        leaf[4:], leaves[4:] - 5, atol=1e-6
    )


def test_depth_credit_heeds_weight_and_clamp():
    leaves, groups = torch.tensor([1.0, 3.0, 4.0, 8.0, 5.0, 5.0, 7.0, 3.0]), torch.arange(8) // 4
    credited = group(leaves, groups)
    whole = depth_credit(credited, groups, 2)
    assert torch.allclose(whole[2], credited, atol=1e-6) and torch.allclose(
        depth_credit(0.1 * credited, groups, 2), 0.1 * whole, atol=1e-6
    )
    assert whole[1].tolist() == pytest.approx([-1, -1, 1, 1, 0, 0, 0, 0], abs=1e-5)
    clamped = depth_credit(credited.clamp(-0.5, 0.5), groups, 2)
    assert clamped.abs().max() <= 0.5 and (clamped[1] != 0).any()


def test_each_step_gets_its_nodes_advantage_and_the_root_is_not_trained():
    t = Trainer(
        policy(),
        [bright(8)],
        TrainConfig(train_steps=0, num_minibatches=1),
        callbacks=[],
        sampler=TreeSampler((1, 3)),
    )
    batch = t.collect(t.tasks[0])
    (rows,) = t.updates.plan(batch)
    table = depth_credit(batch.advantage, batch.groups, 2)
    assert (
        set(rows['step'].tolist()) == {1, 2, 3} and len(rows['step']) == 8 * 3
    )  # of five, the last step is deterministic
    for step, sample, a in zip(rows['step'].tolist(), rows['sample'].tolist(), rows['advantage']):
        assert a == table[1 if step < 3 else 2, sample]


def test_it_raises_its_reward():
    t = Trainer(
        policy(),
        [bright(48)],
        TrainConfig(epochs=12, train_steps=0, num_minibatches=2, warmup=0, lr=3e-3, seed=1),
        callbacks=[],
        sampler=BranchSampler(first=0.6),
    )
    rewards = [h['tasks']['bright']['reward'] for h in t.fit()]
    assert sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.parametrize(
    'attempt, words',
    [
        (lambda: branch_rollout(policy(), PROMPTS, GROUPS, 0), 'branching must be in 1 … 5 .*got 0'),
        (
            lambda: branch_rollout(policy(), PROMPTS, torch.zeros(8, dtype=torch.long), 2),
            'group 0 has several prompts',
        ),
        (lambda: BranchSampler(first=0.0), r'first must be in \(0, 1\]; got 0.0'),
        (lambda: Contrastive(high=-1.0, low=1.0), 'low must not be above high'),
        (lambda: trained_steps(0, 1, 5, 2.0), r'first must be in \(0, 1\]; got 2.0'),
        (lambda: TreeSampler(()), r'splits must be .*got \(\)'),
        (lambda: TreeSampler((2, 1)), r'splits must be .*got \(2, 1\)'),
        (lambda: TreeSampler((1, 1)), 'ascending steps'),
    ],
)
def test_bad_input_is_named(attempt, words):
    with pytest.raises(ValueError, match=words):
        attempt()


def test_branchgrpos_deviation_is_the_unbiased_one_of_the_nodes_of_a_depth():
    "Leaves whose own deviation is 1: each depth is (worth - mean) / std of its nodes."
    leaves, groups = torch.tensor([1.0, 3.0, 4.0, 8.0]), torch.zeros(4, dtype=torch.long)
    leaves = leaves / leaves.std(correction=0)
    root, middle, leaf = depth_credit(leaves, groups, 2, correction=1)
    pairs = leaves.view(2, 2).mean(1)
    assert (root == 0).all() and torch.allclose(leaf, (leaves - leaves.mean()) / leaves.std(), atol=1e-5)
    right = ((pairs - pairs.mean()) / pairs.std()).repeat_interleave(2)
    assert torch.allclose(middle, right, atol=1e-5)
    assert TreeSampler((0, 2), correction=1).correction == 1
