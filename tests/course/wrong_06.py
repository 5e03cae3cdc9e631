"Typical wrong answers to the exercises of lesson 6."

from answers import Wrong

WRONG = {
    '6.1': Wrong(
        'def effective_size(log_weights):\n    w = log_weights.exp()\n    return w.sum() ** 2 / w.square().sum()',
        'Subtract the largest log-weight',
    ),
    '6.2': Wrong(
        'def ppo_loss(log_prob, old_log_prob, advantage, eps):\n'
        '    ratio = (log_prob - old_log_prob).exp()\n'
        '    return -(ratio.clamp(1 - eps, 1 + eps) * advantage).mean()',
        'must be pulled back',
    ),
    '6.3': Wrong('ratio, advantage = 1.5, 1.0', 'PPO has no gradient either'),
    '6.4': Wrong(
        'def clip_range(nats, dims):\n    return math.exp(nats) - 1',
        'the range for the ratio of the whole step',
    ),
}
