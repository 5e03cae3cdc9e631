"Lesson 13: wrong answers."

from answers import Wrong

WRONG = {
    '13.1': Wrong(
        'def score_gradient(r, theta, sigma, z):\n'
        '    x = theta + sigma * z\n'
        '    return r(x) * z\n\n\n'
        'def pathwise_gradient(r, theta, sigma, z):\n'
        '    x = (theta + sigma * z).requires_grad_()\n'
        '    return torch.autograd.grad(r(x).sum(), x)[0]',
        'which is z/σ',
    ),
    '13.2': Wrong(
        'def slope(f, x, direction, h):\n    return (f(x + h * direction) - f(x)) / h',
        'one-sided difference',
    ),
    '13.3': Wrong(
        'def draft1(policy, latents, prompts, reward):\n'
        '    step, cond = policy.num_steps - 1, policy.encode(prompts)\n'
        '    clean = policy.transition(latents, step, cond).mean\n'
        '    return reward.raw(policy.decode(clean), prompts)',
        'no graph to the weights',
    ),
    '13.4': Wrong(
        'has_slope = dict(clip_score=True, jpeg_compressibility=True, composition=True, fairness=False, '
        'preference=True)',
        'jpeg_compressibility: True',
    ),
}
