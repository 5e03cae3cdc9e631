"Typical wrong answers to the exercises of lesson 5."

from answers import Wrong

WRONG = {
    '5.1': Wrong(
        'def best_baseline(rewards, scores):\n    return rewards.mean()',
        'That is the mean reward',
    ),
    '5.2': Wrong(
        'def leave_one_out(rewards, groups):\n'
        '    same = (groups[:, None] == groups).double()\n'
        '    return rewards - same @ rewards.double() / same.sum(1)',
        'Each sample is in its own baseline',
    ),
    '5.3': Wrong(
        'def flat_share(p, size):\n    return (1 - p) ** size',
        'Groups in which all succeed are flat too',
    ),
}
