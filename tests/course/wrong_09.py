"Typical wrong answers to the exercises of lesson 9."

from answers import Wrong

WRONG = {
    '9.1': Wrong(
        'def standard_error(base, tuned):\n    return ((base.var() + tuned.var()) / len(base)) ** 0.5',
        'take the differences first',
    ),
    '9.2': Wrong(
        'def interval(change, prompts):\n'
        '    drawn = change[torch.randint(len(change), (2000, len(change)))].mean(1)\n'
        '    return drawn.quantile(0.025), drawn.quantile(0.975)',
        'Draw prompts',
    ),
    '9.3': Wrong(
        "verdicts = {k: 'better' if (v - base)[few].mean() > 0 else 'worse' for k, v in runs.items()}",
        'which holds 0, so nobody can tell',
    ),
    '9.4': Wrong('def false_alarm(runs):\n    return 0.025 * runs', 'adds up probabilities'),
}
