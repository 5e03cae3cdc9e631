"Lesson 10: wrong answers."

from answers import Wrong

WRONG = {
    '10.1': Wrong(
        'def gaussian_kl(mean_p, std_p, mean_q, std_q):\n'
        '    p, q = torch.as_tensor(std_p), torch.as_tensor(std_q)\n'
        '    each = (q / p).log() + (p**2 + (mean_p - mean_q) ** 2) / (2 * q**2)\n'
        '    return each.sum(1)',
        '- ½ in each dimension',
    ),
    '10.2': Wrong(
        'def tilted(p0, r, beta):\n    p = p0 * (beta * r).exp()\n    return p / p.sum()',
        'tilt by exp(r / beta)',
    ),
    '10.3': Wrong(
        'def adapt(weight, kl, target):\n    return 2 * weight if kl > target else weight / 2',
        'it changes only beyond',
    ),
    '10.4': Wrong(
        'def held(kls, target):\n    return sum(kl <= target for kl in kls) / len(kls)',
        'three of eight lie between',
    ),
}
