"Lesson 14: wrong answers."

from answers import Wrong

WRONG = {
    '14.1': Wrong(
        'def my_reward(images, prompts):\n    return (images - images.mean()).square().mean((1, 2, 3))',
        'another reward among others than alone',
    ),
    '14.2': Wrong(
        'def pairs_needed(deviation, effect):\n    return round((1.96 * deviation / effect) ** 2)',
        'take (2.8',
    ),
    '14.3': Wrong(
        "def verdict(low, high, margin):\n    return 'pass' if (low + high) / 2 > margin else 'fail'",
        'all of it must lie',
    ),
    '14.4': Wrong(
        "my_claim = dict(metric='saturation', margin=0.05, guard='clip_score', guard_may_fall=0.05, pairs=64,"
        ' seeds=(0,))',
        'One run is an anecdote',
    ),
}
