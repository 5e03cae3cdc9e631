"Lesson 2: a denoising step is a Gaussian."

from answers import Wrong

WRONG = {
    '2.1': Wrong(
        '''
def step_std(a, b, eta):
    return eta**2 * (1 - b) * (1 - a / b) / (1 - a)
''',
        'its square root is the spread',
    ),
    '2.2': Wrong(
        '''
def step_mean(clean, noise, b, std):
    return b.sqrt() * clean + (1 - b).sqrt() * noise
''',
        'must be 1 − b − σ²',
    ),
    '2.3': Wrong(
        '''
def log_prob(value, mean, std):
    each = -((value - mean) ** 2) / (2 * std**2) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return each.flatten(1).mean(1)
''',
        '−log σ is missing',
    ),
    '2.4': Wrong(
        '''
def expected_log_prob(std):
    return -std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
''',
        'z² has mean 1',
    ),
}
