"Lesson 3: denoising is a Markov decision process."

from answers import Wrong

WRONG = {
    '3.1': Wrong('first_step_without_banana = 10', 'that was decided earlier'),
    '3.2': Wrong(
        '''
def path_log_prob(policy, traj):
    return traj.log_probs.sum(0)
''',
        'nats per dimension',
    ),
    '3.3': Wrong(
        '''
def ratio(policy, traj, step):
    now = policy.transition(traj.latents[step], step, policy.encode(traj.prompts))
    return now.log_prob(traj.latents[step + 1]) - traj.log_probs[step]
''',
        'its exponential is the ratio',
    ),
    '3.4': Wrong(
        '''
def mend(policy):
    policy.network.requires_grad_(False)
    return policy
''',
        'Frozen weights do not stop them',
    ),
    '3.5': Wrong(
        '''
def careful_step(gaussian, noise):
    next_latents = gaussian.sample(noise)
    return next_latents.bfloat16(), gaussian.log_prob(next_latents)
''',
        'you scored what was not stored',
    ),
}
