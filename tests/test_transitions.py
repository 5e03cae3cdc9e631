"The denoising step against other projects' numbers, diffusers' own step, and torch.distributions."
import json
from pathlib import Path

import pytest, torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from drl_toolkit.transitions import Gaussian, tables, transition

ORACLES = Path(__file__).parent / 'oracles'
CASES = [c for c in json.loads((ORACLES / 'oracles.json').read_text())['transitions'] if c['scheduler'] == 'DDIMScheduler']
SD = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False)

@pytest.mark.parametrize('case', CASES, ids=lambda c: c['key'])
def test_oracle(case):
    "Mean over the latent dimensions, as DDPO's code computes it."
    data = {k.split('.', 1)[1]: v for k, v in load_file(ORACLES / 'transitions.safetensors').items() if k.startswith(case['key'] + '.')}
    scheduler = DDIMScheduler(**case['config'])
    scheduler.set_timesteps(case['num_inference_steps'])
    assert scheduler.timesteps[case['step_index']] == case['timestep']
    g = transition(scheduler, data['model_output'], case['timestep'], data['sample'], eta=case['eta'])
    assert torch.allclose(g.log_prob(data['prev_sample']), data['log_prob'], rtol=1e-5, atol=1e-6)
    by_index = tables(scheduler, case['num_inference_steps'], case['eta']).transition(data['model_output'], case['step_index'], data['sample'])
    assert torch.equal(by_index.mean, g.mean) and torch.equal(by_index.std, g.std)

@settings(max_examples=60, deadline=None)
@given(prediction=st.sampled_from(['epsilon', 'v_prediction', 'sample']), spacing=st.sampled_from(['leading', 'trailing', 'linspace']),
       offset=st.integers(0, 1), to_one=st.booleans(), zero_snr=st.booleans(), clip=st.booleans(), steps=st.integers(1, 50),
       eta=st.sampled_from([0., .3, 1.]), seed=st.integers(0, 99), data=st.data())
def test_same_sample_as_diffusers(prediction, spacing, offset, to_one, zero_snr, clip, steps, eta, seed, data):
    s = DDIMScheduler(**SD | dict(clip_sample=clip), prediction_type=prediction, timestep_spacing=spacing, steps_offset=offset,
                      set_alpha_to_one=to_one, rescale_betas_zero_snr=zero_snr)
    table = tables(s, steps, eta)
    i = data.draw(st.integers(0, steps - 1))
    x, out, z = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    theirs = s.step(out, s.timesteps[i], x, eta=eta, variance_noise=z).prev_sample
    if zero_snr and not theirs.isfinite().all(): return      # diffusers itself divides by zero or takes the root of a rounding error
    assert torch.allclose(table.transition(out, i, x).sample(z), theirs, rtol=1e-5, atol=2e-6)

def test_finite_at_pure_noise():
    "Where diffusers' step gives NaN (η = 1, zero terminal SNR) ours does not."
    s = DDIMScheduler(**SD, prediction_type='v_prediction', timestep_spacing='trailing', rescale_betas_zero_snr=True)
    for steps in range(2, 30):
        g = tables(s, steps).transition(torch.randn(1, 4, 8, 8), 0, torch.randn(1, 4, 8, 8))
        assert g.mean.isfinite().all() and g.std.isfinite().all()

@settings(max_examples=40, deadline=None)
@given(std=st.floats(.01, 10), other=st.floats(.01, 10), shape=st.sampled_from([(1, 1, 1, 1), (2, 3, 2, 5), (3, 16, 8, 8)]), seed=st.integers(0, 99))
def test_against_torch_distributions(std, other, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    mean, mean2, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    spread = lambda v: torch.full((shape[0], 1, 1, 1), v, dtype=torch.float64)
    p, q = Gaussian(mean, spread(std)), Gaussian(mean2, spread(other))
    assert torch.allclose(p.log_prob(x), Normal(mean, std).log_prob(x).flatten(1).mean(1))
    assert torch.allclose(p.log_prob(x, 'sum'), Normal(mean, std).log_prob(x).flatten(1).sum(1))
    assert torch.allclose(p.kl(q), kl_divergence(Normal(mean, std), Normal(mean2, other)).flatten(1).sum(1))

def test_rows_may_have_their_own_step():
    s = DDIMScheduler(**SD, prediction_type='v_prediction', timestep_spacing='trailing')
    table, x, out = tables(s, 10), torch.randn(10, 4, 4, 4), torch.randn(10, 4, 4, 4)
    together = table.transition(out, torch.arange(10), x)
    for i in range(10):
        one = table.transition(out[i:i + 1], i, x[i:i + 1])
        assert torch.equal(one.mean[0], together.mean[i]) and torch.equal(one.std[0], together.std[i])

def test_gradient_of_log_prob_by_finite_differences():
    std = torch.tensor([.3, .7], dtype=torch.float64).reshape(2, 1, 1, 1)
    x, mean = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, std).log_prob(x), mean.requires_grad_())

def test_deterministic_steps_have_no_density():
    g = Gaussian(torch.zeros(2, 1, 2, 2, requires_grad=True), torch.tensor([0., .5]).reshape(2, 1, 1, 1))
    log_prob = g.log_prob(torch.ones(2, 1, 2, 2))
    log_prob.sum().backward()
    assert log_prob[0] == 0 and (g.mean.grad[0] == 0).all() and g.mean.grad.isfinite().all() and (g.kl(g) == 0).all()

def test_refusals_name_what_is_wrong():
    with pytest.raises(TypeError, match='EulerDiscreteScheduler; one of these is right: DDIMScheduler'): tables(EulerDiscreteScheduler(), 10)
    with pytest.raises(ValueError, match='eta is -1'): tables(DDIMScheduler(), 10, eta=-1)
    with pytest.raises(ValueError, match='thresholding'): tables(DDIMScheduler(thresholding=True), 10)
    with pytest.raises(ValueError, match="reduce is 'max'"): Gaussian(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).log_prob(torch.zeros(1, 1, 1, 1), 'max')
