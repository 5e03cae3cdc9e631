"The denoising step against other projects' numbers, diffusers' own step, and torch.distributions."

import inspect, json
from pathlib import Path
from unittest.mock import patch

import diffusers, pytest, torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from drl_toolkit.sampling.transitions import Gaussian, sampler_coefficients, training_tables, transition
from drl_toolkit.sampling.config import PREV_TIMESTEPS

ORACLES = Path(__file__).parents[1] / 'oracles'
CASES = json.loads((ORACLES / 'oracles.json').read_text())['transitions']
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', clip_sample=False)


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['key'])
def test_oracle(case):
    "Mean over the latent dimensions, as DDPO's and Flow-GRPO's code compute it."
    data = {
        k.split('.', 1)[1]: v
        for k, v in load_file(ORACLES / 'transitions.safetensors').items()
        if k.startswith(case['key'] + '.')
    }
    scheduler = getattr(diffusers, case['scheduler'])(**case['config'])
    scheduler.set_timesteps(case['num_inference_steps'])
    assert scheduler.timesteps[case['step_index']] == pytest.approx(case['timestep'], abs=1e-3)
    options = {k: case[k] for k in ('eta', 'noise_level') if k in case}
    for suffix in ('', '_2') if 'model_output_2' in data else ('',):
        g = transition(scheduler, data[f'model_output{suffix}'], case['timestep'], data['sample'], **options)
        assert torch.allclose(
            g.log_prob(data['prev_sample']), data[f'log_prob{suffix}'], rtol=1e-5, atol=1e-6
        )
    g = transition(scheduler, data['model_output'], case['timestep'], data['sample'], **options)
    if 'mean' in data:
        assert torch.allclose(g.mean, data['mean'], rtol=1e-5, atol=1e-5)
    by_index = sampler_coefficients(scheduler, case['num_inference_steps'], **options).transition(
        data['model_output'], case['step_index'], data['sample']
    )
    assert torch.equal(by_index.mean, g.mean) and torch.equal(by_index.std, g.std)


def their_step(scheduler, index, output, x, z, **options):
    "diffusers' own step, with the noise z wherever it draws some."
    scheduler._step_index, scheduler.is_scale_input_called = index, True
    with patch(f'{type(scheduler).__module__}.randn_tensor', lambda *a, **k: z):
        return scheduler.step(output, scheduler.timesteps[index], x, **options).prev_sample


# what a checkpoint's configuration may hold, per class
OPTIONS = {
    DDPMScheduler: dict(
        prediction_type=['epsilon', 'v_prediction', 'sample'],
        timestep_spacing=['leading', 'trailing', 'linspace'],
        steps_offset=[0, 1],
        variance_type=['fixed_small', 'fixed_small_log', 'fixed_large'],
        clip_sample=[False, True],
    ),
    EulerAncestralDiscreteScheduler: dict(
        prediction_type=['epsilon', 'v_prediction'],
        timestep_spacing=['leading', 'trailing', 'linspace'],
        steps_offset=[0, 1],
    ),
    DPMSolverMultistepScheduler: dict(
        prediction_type=['epsilon', 'v_prediction', 'sample', 'flow_prediction'],
        timestep_spacing=['leading', 'trailing', 'linspace'],
        use_karras_sigmas=[False, True],
        final_sigmas_type=['zero', 'sigma_min'],
        solver_order=[1],
        algorithm_type=['sde-dpmsolver++'],
    ),
}
FLOW = dict(shift=[1.0, 3.0], use_karras_sigmas=[False, True])


def make(kind, options, draw):
    chosen = {name: draw(st.sampled_from(values)) for name, values in options.items()}
    if chosen.get('prediction_type') == 'flow_prediction':
        chosen |= dict(use_flow_sigmas=True, use_karras_sigmas=False, final_sigmas_type='zero')
    known = inspect.signature(kind.__init__).parameters
    return kind(**{k: v for k, v in (SD if 'beta_start' in known else {}).items() if k in known} | chosen)


def numbers(seed, *shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('kind', OPTIONS)
@settings(max_examples=40, deadline=None)
@given(steps=st.integers(2, 40), seed=st.integers(0, 99), data=st.data())
def test_same_sample_as_every_schedulers_own_step(kind, steps, seed, data):
    s = make(kind, OPTIONS[kind], data.draw)
    table, i = sampler_coefficients(s, steps), data.draw(st.integers(0, steps - 1))
    x, out, z = numbers(seed, 2, 4, 4, 4)
    x = x * table.init_std
    assert torch.allclose(
        table.transition(out, i, x).sample(z),
        their_step(s, i, out, x, z),
        rtol=1e-5,
        atol=2e-6 * x.abs().max().item(),
    )


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 40), seed=st.integers(0, 99), stochastic=st.booleans(), data=st.data())
def test_flow_matching_with_no_noise_and_with_all_is_diffusers_own(steps, seed, stochastic, data):
    s = make(FlowMatchEulerDiscreteScheduler, FLOW | dict(stochastic_sampling=[stochastic]), data.draw)
    table, i = (
        sampler_coefficients(s, steps, **(dict(sde='cps', noise_level=1) if stochastic else dict(eta=0.0))),
        data.draw(st.integers(0, steps - 1)),
    )
    x, out, z = numbers(seed, 2, 16, 4, 4)
    assert torch.allclose(
        table.transition(out, i, x).sample(z), their_step(s, i, out, x, z), rtol=1e-5, atol=2e-6
    )


def test_without_noise_every_family_is_its_deterministic_solver():
    "DDPM is DDIM, Euler ancestral is Euler, the SDE solver is DPM-Solver++."
    x, out, z = numbers(0, 2, 4, 4, 4)
    pairs = [
        (DDPMScheduler(**SD, timestep_spacing='leading'), DDIMScheduler(**SD, set_alpha_to_one=True)),
        (
            EulerAncestralDiscreteScheduler(beta_schedule='scaled_linear'),
            EulerDiscreteScheduler(beta_schedule='scaled_linear'),
        ),
        (
            DPMSolverMultistepScheduler(solver_order=1, algorithm_type='sde-dpmsolver++'),
            DPMSolverMultistepScheduler(solver_order=1, algorithm_type='dpmsolver++'),
        ),
    ]
    for noisy, still in pairs:
        table = sampler_coefficients(noisy, 10, eta=0.0)
        still.set_timesteps(10)
        assert not table.stochastic.any()
        for i in range(10):
            assert torch.allclose(
                table.transition(out, i, x).mean, their_step(still, i, out, x, z), rtol=1e-4, atol=1e-4
            ), (noisy, i)


NOISY = [
    (DDIMScheduler(**SD, prediction_type='v_prediction'), {}),
    (DDPMScheduler(**SD), {}),
    (EulerAncestralDiscreteScheduler(), {}),
    (DPMSolverMultistepScheduler(solver_order=1, algorithm_type='sde-dpmsolver++'), {}),
    *[(FlowMatchEulerDiscreteScheduler(), dict(sde=kind)) for kind in ('flow', 'dance', 'cps')],
]
ids = lambda v: type(v).__name__ if not isinstance(v, dict) else v.get('sde', '')


@pytest.mark.parametrize('scheduler, options', NOISY, ids=ids)
@settings(max_examples=10, deadline=None)
@given(
    steps=st.integers(2, 30),
    seed=st.integers(0, 99),
    shape=st.sampled_from([(4, 3, 3), (1, 2, 5), (6, 4)]),
    data=st.data(),
)
def test_density_divergence_and_moments_of_every_family(scheduler, options, steps, seed, shape, data):
    """torch.distributions agrees; many samples have the stated mean and spread; finite differences agree with
    autograd."""
    table = sampler_coefficients(scheduler, steps, **options)
    i = data.draw(st.sampled_from(table.stochastic.nonzero().flatten().tolist()))
    x, out, other = numbers(seed, 2, *shape)
    g, h = table.transition(out, i, x), table.transition(other, i, x)
    p, q = (Normal(v.mean.double(), table.std[i].double()) for v in (g, h))
    y = g.sample(other)
    assert torch.allclose(
        g.log_prob(y).double(), p.log_prob(y.double()).flatten(1).mean(1), rtol=1e-4, atol=1e-4
    )
    assert torch.allclose(g.kl(h).double(), kl_divergence(p, q).flatten(1).sum(1), rtol=1e-3, atol=1e-4)
    drawn = torch.stack(
        [g.sample(torch.randn(x.shape, generator=torch.Generator().manual_seed(k))) for k in range(400)]
    )
    assert ((drawn.mean(0) - g.mean).abs() < 5.5 * g.std / 20).all() and (
        (drawn.std(0) / g.std - 1).abs() < 0.25
    ).all()
    out = out.clone().requires_grad_()
    table.transition(out, i, x).log_prob(y, 'sum').sum().backward()
    way = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).double()
    moved = lambda by: (
        _double(table)
        .transition(out.detach().double() + by * way, i, x.double())
        .log_prob(y.double(), 'sum')
        .sum()
    )
    step = 1e-4 * table.std[i].item()
    slope = (moved(step) - moved(-step)) / (2 * step)
    assert (out.grad.double() * way).sum().item() == pytest.approx(
        slope.item(), rel=2e-2, abs=1e-2 * out.grad.norm().item()
    )


def _double(table):
    from dataclasses import fields, replace

    return replace(
        table,
        **{
            f.name: getattr(table, f.name).double()
            for f in fields(table)
            if torch.is_tensor(getattr(table, f.name))
        },
    )


@pytest.mark.parametrize('scheduler, options', NOISY, ids=ids)
def test_a_window_is_noisy_and_the_rest_is_not(scheduler, options):
    "MixGRPO: inside as with all the noise, outside as with none."
    x, out, _ = numbers(1, 2, 4, 4, 4)
    every, none, window = (
        sampler_coefficients(scheduler, 12, **options, **more)
        for more in ({}, dict(eta=0.0), dict(stochastic_steps=range(3, 6)))
    )
    assert window.stochastic.nonzero().flatten().tolist() == [3, 4, 5]
    for i in range(12):
        a, b = window.transition(out, i, x), (every if 3 <= i < 6 else none).transition(out, i, x)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)


@pytest.mark.parametrize('scheduler, options', NOISY, ids=ids)
def test_noised_latents_and_the_right_answer_give_the_clean_ones_back(scheduler, options):
    table = sampler_coefficients(scheduler, 10, **options)
    clean, noise, _ = numbers(2, 10, 4, 3, 3)
    steps = torch.arange(10)
    x = table.noised(clean, steps, noise)
    found, spread = table.clean_and_noise(table.target(clean, steps, noise), steps, x)
    assert torch.allclose(found, clean, atol=2e-3) and torch.allclose(spread, noise, atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    prediction=st.sampled_from(['epsilon', 'v_prediction', 'sample']),
    spacing=st.sampled_from(['leading', 'trailing', 'linspace']),
    offset=st.integers(0, 1),
    to_one=st.booleans(),
    zero_snr=st.booleans(),
    clip=st.booleans(),
    steps=st.integers(1, 50),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_same_sample_as_diffusers(
    prediction, spacing, offset, to_one, zero_snr, clip, steps, eta, seed, data
):
    s = DDIMScheduler(
        **SD | dict(clip_sample=clip),
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        rescale_betas_zero_snr=zero_snr,
    )
    if zero_snr and prediction == 'epsilon' and spacing != 'leading':
        return  # refused: see test_epsilon_at_pure_noise_is_refused
    table = sampler_coefficients(s, steps, eta, prev_timestep='diffusers')
    i = data.draw(st.integers(0, steps - 1))
    x, out, z = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    theirs = s.step(out, s.timesteps[i], x, eta=eta, variance_noise=z).prev_sample
    if zero_snr and not theirs.isfinite().all():
        return  # diffusers itself divides by zero or takes the root of a rounding error
    assert torch.allclose(table.transition(out, i, x).sample(z), theirs, rtol=1e-5, atol=2e-6)


def posterior(alpha, prev):
    """q(x_s | x_t, x_0) by Bayes' rule on two Gaussians, in float64: shares of x_0 and x_t, and the
    deviation. [DDPM Eq 6 and 7]"""
    ratio = alpha / prev  # x_t given x_s: N(√ratio x_s, 1 - ratio)
    precision = 1 / (1 - prev) + ratio / (1 - ratio)
    return prev**0.5 / (1 - prev) / precision, ratio**0.5 / (1 - ratio) / precision, precision**-0.5


@pytest.mark.parametrize('kind', [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize('steps', [2, 7, 10, 13, 20, 50])
def test_a_step_is_the_posterior_of_the_timestep_that_is_visited_next(kind, spacing, steps):
    "With η = 1, by hand: ᾱ of the betas, Bayes' rule between this timestep and the next of the schedule."
    s = kind(**SD, timestep_spacing=spacing, prediction_type='sample')
    table = sampler_coefficients(s, steps)
    cumulative = (
        torch.linspace(SD['beta_start'] ** 0.5, SD['beta_end'] ** 0.5, 1000, dtype=torch.double)
        .square()
        .neg()
        .add(1)
        .cumprod(0)
    )
    visited = table.timesteps.tolist()
    x, clean = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(steps))
    for i, (t, after) in enumerate(zip(visited, visited[1:])):
        of_clean, of_sample, std = posterior(cumulative[t], cumulative[after])
        g = table.transition(clean, i, x)
        assert g.std.item() == pytest.approx(std.item(), rel=2e-4), (i, t, after)
        assert torch.allclose(
            g.mean.double(), of_clean * clean.double() + of_sample * x.double(), rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize('spacing', ['trailing', 'linspace'])
@pytest.mark.parametrize('steps', [7, 10, 13])
def test_diffusers_own_previous_timestep_is_an_option(spacing, steps):
    """Its very step on request; with `leading` spacing, or where T divides the timesteps, there is no
    difference to the bit."""
    s = DDIMScheduler(**SD, timestep_spacing=spacing)
    table = sampler_coefficients(s, steps, prev_timestep='diffusers')
    x, out, z = numbers(steps, 2, 4, 4, 4)
    for i in range(steps):
        theirs = s.step(out, s.timesteps[i], x, eta=1.0, variance_noise=z).prev_sample
        assert torch.allclose(table.transition(out, i, x).sample(z), theirs, rtol=1e-5, atol=2e-6)
    same = torch.equal(table.std, sampler_coefficients(s, steps).std)
    assert same == (spacing == 'trailing' and steps == 10)
    for T in (steps, 100, 600):
        each = [
            sampler_coefficients(
                DDIMScheduler(**SD, timestep_spacing='leading', steps_offset=1), T, prev_timestep=p
            )
            for p in PREV_TIMESTEPS
        ]
        assert all(
            torch.equal(getattr(each[0], k), getattr(each[1], k))
            for k in ('std', 'of_clean', 'of_noise', 'signal')
        )


@pytest.mark.parametrize(
    'kind, more',
    [
        (DDIMScheduler, {}),
        (DDPMScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, dict(solver_order=1, algorithm_type='sde-dpmsolver++')),
    ],
)
def test_epsilon_at_pure_noise_is_refused(kind, more):
    """ε says nothing of the clean latent there; v does, and a schedule that does not visit that timestep
    needs nothing of it."""
    known = inspect.signature(kind.__init__).parameters
    make = lambda prediction, spacing: kind(
        **{k: v for k, v in SD.items() if k in known},
        **more,
        prediction_type=prediction,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=True,
    )
    with pytest.raises(
        ValueError,
        match="prediction_type is 'epsilon', but its schedule starts at pure noise .*'v_prediction' is right",
    ):
        sampler_coefficients(make('epsilon', 'trailing'), 10)
    for prediction, spacing in (('v_prediction', 'trailing'), ('epsilon', 'leading')):
        table = sampler_coefficients(make(prediction, spacing), 10)
        g = table.transition(torch.randn(10, 4, 2, 2), torch.arange(10), torch.randn(10, 4, 2, 2))
        assert g.mean.isfinite().all() and g.std.isfinite().all()


def test_the_forward_process_of_a_solver_on_flow_sigmas_is_the_flow():
    """DPM-Solver of a flow model: x_σ = (1 - σ) x_0 + σ ε at timestep 1000 σ, as its own sampling schedule
    has it."""
    s = DPMSolverMultistepScheduler(
        solver_order=1,
        algorithm_type='sde-dpmsolver++',
        use_flow_sigmas=True,
        prediction_type='flow_prediction',
        flow_shift=3.0,
    )
    forward, sampled = training_tables(s), sampler_coefficients(s, 10)
    assert (
        torch.allclose(forward.signal + forward.noise, torch.ones(1000))
        and forward.prediction_type == 'flow_prediction'
    )
    same = training_tables(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert all(torch.equal(getattr(forward, k), getattr(same, k)) for k in ('timesteps', 'signal', 'noise'))
    assert torch.allclose(sampled.timesteps / 1000, sampled.noise, atol=1e-3) and torch.allclose(
        sampled.signal, 1 - sampled.noise, atol=1e-6
    )
    with pytest.raises(ValueError, match='use_flow_sigmas must be True'):
        sampler_coefficients(
            DPMSolverMultistepScheduler(
                solver_order=1, algorithm_type='sde-dpmsolver++', prediction_type='flow_prediction'
            ),
            10,
        )


@pytest.mark.parametrize(
    'scheduler, steps, words',
    [
        (DDIMScheduler(), 1001, 'num_steps must be in 1 … 1000, the timesteps of DDIMScheduler; got 1001'),
        (
            DPMSolverMultistepScheduler(solver_order=1, algorithm_type='sde-dpmsolver++'),
            2000,
            'num_steps must be in .*; got 2000',
        ),
        (
            DDIMScheduler(steps_offset=1),
            1000,
            "its first timestep would be 1000, and the network was trained at 0 to 999",
        ),
        (
            EulerAncestralDiscreteScheduler(timestep_spacing='leading', steps_offset=1),
            1000,
            'first timestep would be 1000',
        ),
        (DDIMScheduler(timestep_spacing='trailing'), 499, 'cannot part its timesteps'),
        (
            DPMSolverMultistepScheduler(
                solver_order=1, algorithm_type='sde-dpmsolver++', timestep_spacing='leading'
            ),
            1000,
            'cannot part its timesteps',
        ),
    ],
)
def test_numbers_of_steps_that_a_schedule_has_not_are_refused(scheduler, steps, words):
    with pytest.raises(ValueError, match=words):
        sampler_coefficients(scheduler, steps)


def test_finite_at_pure_noise():
    "Where diffusers' step gives NaN (η = 1, zero terminal SNR) ours does not."
    s = DDIMScheduler(
        **SD, prediction_type='v_prediction', timestep_spacing='trailing', rescale_betas_zero_snr=True
    )
    for steps in range(2, 30):
        g = sampler_coefficients(s, steps).transition(torch.randn(1, 4, 8, 8), 0, torch.randn(1, 4, 8, 8))
        assert g.mean.isfinite().all() and g.std.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    std=st.floats(0.01, 10),
    other=st.floats(0.01, 10),
    shape=st.sampled_from([(1, 1, 1, 1), (2, 3, 2, 5), (3, 16, 8, 8)]),
    seed=st.integers(0, 99),
)
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
    table, x, out = sampler_coefficients(s, 10), torch.randn(10, 4, 4, 4), torch.randn(10, 4, 4, 4)
    together = table.transition(out, torch.arange(10), x)
    for i in range(10):
        one = table.transition(out[i : i + 1], i, x[i : i + 1])
        assert torch.equal(one.mean[0], together.mean[i]) and torch.equal(one.std[0], together.std[i])


def test_gradient_of_log_prob_by_finite_differences():
    std = torch.tensor([0.3, 0.7], dtype=torch.float64).reshape(2, 1, 1, 1)
    x, mean = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, std).log_prob(x), mean.requires_grad_())


def test_deterministic_steps_have_no_density():
    g = Gaussian(torch.zeros(2, 1, 2, 2, requires_grad=True), torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1))
    log_prob = g.log_prob(torch.ones(2, 1, 2, 2))
    log_prob.sum().backward()
    assert (
        log_prob[0] == 0
        and (g.mean.grad[0] == 0).all()
        and g.mean.grad.isfinite().all()
        and (g.kl(g) == 0).all()
    )


@pytest.mark.parametrize(
    'attempt, words',
    [
        (
            lambda: sampler_coefficients(EulerDiscreteScheduler(), 10),
            'must be one of DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, Euler.*; got '
            'EulerDiscreteScheduler',
        ),
        (lambda: sampler_coefficients(DDIMScheduler(), 10, eta=-1), 'eta must be .*; got -1'),
        (
            lambda: sampler_coefficients(DDPMScheduler(), 10, eta=0.5),
            'eta must be 0 or 1 with a DDPMScheduler; got 0.5',
        ),
        (lambda: sampler_coefficients(DDIMScheduler(thresholding=True), 10), 'thresholding'),
        (
            lambda: sampler_coefficients(DDIMScheduler(prediction_type='flow'), 10),
            "prediction_type must be one of 'epsilon', .*; got 'flow'",
        ),
        (
            lambda: sampler_coefficients(DDPMScheduler(variance_type='learned'), 10),
            "variance_type must be .*; got 'learned'",
        ),
        (
            lambda: sampler_coefficients(EulerAncestralDiscreteScheduler(prediction_type='sample'), 10),
            "prediction_type must be .*; got 'sample'",
        ),
        (
            lambda: sampler_coefficients(DPMSolverMultistepScheduler(), 10),
            'solver_order must be 1, .*; got 2',
        ),
        (
            lambda: sampler_coefficients(DPMSolverMultistepScheduler(solver_order=1), 10),
            "algorithm_type must be .*; got 'dpmsolver",
        ),
        (
            lambda: sampler_coefficients(DDIMScheduler(), 10, prev_timestep='last'),
            "prev_timestep must be one of 'schedule', 'diffusers'; got 'last'",
        ),
        (
            lambda: sampler_coefficients(DDIMScheduler(), 10, sde='cps'),
            "sde is 'cps', but DDIMScheduler has noise of its own",
        ),
        (
            lambda: sampler_coefficients(FlowMatchEulerDiscreteScheduler(), 10, sde='x'),
            "sde must be one of 'flow', 'dance', 'cps'; got 'x'",
        ),
        (
            lambda: sampler_coefficients(FlowMatchEulerDiscreteScheduler(), 10, noise_level=-1),
            'noise_level must be a number of at least 0 .*; got -1',
        ),
        (
            lambda: sampler_coefficients(FlowMatchEulerDiscreteScheduler(), 10, sde='cps', noise_level=2.0),
            r'noise_level must be in \[0, 1\]',
        ),
        (
            lambda: sampler_coefficients(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 10),
            "that is sde='cps' with noise_level=1",
        ),
        (
            lambda: sampler_coefficients(DDIMScheduler(), 10, stochastic_steps=[10]),
            'stochastic_steps must hold indices from 0 to 9; got 10',
        ),
        (lambda: transition(DDIMScheduler(), None, 1, torch.zeros(1)), 'num_steps must be .*; got None'),
        (
            lambda: Gaussian(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).log_prob(
                torch.zeros(1, 1, 1, 1), 'max'
            ),
            "reduce must be 'mean' or 'sum'; got 'max'",
        ),
    ],
)
def test_refusals_name_what_is_wrong(attempt, words):
    with pytest.raises((TypeError, ValueError), match=words):
        attempt()
