"Lesson 11: wrong answers."

from answers import Wrong

WRONG = {
    '11.1': Wrong(
        'def open_share(values):\n'
        '    within = values.var(1).mean()\n'
        '    between = values.mean(1).var()\n'
        '    return within / (within + between)',
        'less within / m',
    ),
    '11.2': Wrong(
        'def schedule(epoch, epochs, num_steps, first):\n'
        '    start = round(first * num_steps)\n'
        '    stages = num_steps - start\n'
        '    return start + epoch * stages // epochs',
        'num_steps - start + 1',
    ),
    '11.3': Wrong(
        'def network_rows(families, branches, steps, last):\n    return families * branches * steps',
        'computed once a family',
    ),
    '11.4': Wrong(
        'def choose(shares, least=0.5):\n'
        '    return max(last for last, share in shares.items() if share >= least)',
        'fewest last steps',
    ),
}
