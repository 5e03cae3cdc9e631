"Typical wrong answers to the exercises of lesson 8."

from answers import Wrong

WRONG = {
    '8.1': Wrong(
        'def simulated_floor(n, classes):\n'
        '    drawn = torch.randint(classes, (5000, n))\n'
        '    shares = F.one_hot(drawn, classes).float().mean((0, 1))\n'
        '    return (shares - 1 / classes).norm()',
        'Take the distance of each group first',
    ),
    '8.2': Wrong(
        'def own_credit(tones):\n'
        '    whole, rows = fair.statistical_parity(tones), torch.arange(len(tones))\n'
        '    return torch.tensor([whole - fair.statistical_parity(tones[rows != i]) for i in rows])',
        'The sign is wrong',
    ),
    '8.3': Wrong(
        'def verdict(base, tuned, floor, faces):\n'
        '    closed = (base - tuned) / base\n'
        '    return closed, closed >= 0.25 and faces[1] / faces[0] >= 0.97',
        'No model gets below the floor',
    ),
}
