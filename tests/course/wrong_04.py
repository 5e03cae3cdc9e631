"Lesson 4: REINFORCE."

from answers import Wrong

WRONG = {
    '4.1': Wrong(
        '''
def score(x, mean, std):
    return (mean - x) / std**2
''',
        'so the gradient is positive',
    ),
    '4.2': Wrong(
        '''
def reinforce_loss(log_prob, reward):
    return (reward * log_prob.sum(0)).mean()
''',
        'put a minus before it',
    ),
    '4.3': Wrong(
        '''
def train(toy, updates=40):
    optimizer = torch.optim.Adam(toy.parameters(), lr=0.003)
    for update in range(updates):
        x = sample(toy, 200, seed=update)
        loss = (x[-1] > 0).float().mean() - log_probs(toy, x).sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return toy
''',
        'is each path weighed by its own reward',
    ),
    '4.4': Wrong(
        '''
def emoji_loss(policy, rows, advantage):
    now = policy.transition(rows['latents'], rows['step'], rows['cond'])
    return -(advantage * now.log_prob(rows['next_latents'])).sum()
''',
        'take the mean over the rows',
    ),
}
