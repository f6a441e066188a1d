"""The next token is drawn from exactly the truncated distribution, by its own row, seed and position alone."""

import pytest
import torch

from thinksafe.kernels import sampling
from thinksafe.kernels.sampling import MAX_VOCAB_SIZE, exponential_noise, sample

DRAWS = 200_000


def columns(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0) -> list[torch.Tensor]:
    """The arguments of `sample` after the logits, from settings given once or a value a row."""
    values = [(temperature, "f"), (top_k, "i"), (top_p, "f"), (seed, "i"), (position, "i")]
    dtypes = {"f": torch.float32, "i": torch.int64}
    return [torch.as_tensor(v, dtype=dtypes[d], device=logits.device).expand(len(logits)) for v, d in values]


def draw(logits, **settings) -> torch.Tensor:
    return sample(logits, *columns(logits, **settings))[0]


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution in fp64, one token after the other: the k most likely, then those it takes to reach top_p."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    kept = ranked[: top_k or None]
    probability = (logits[kept].double() / temperature).softmax(-1).tolist()
    result, mass = torch.zeros(len(logits), dtype=torch.float64), 0.0
    for token, share in zip(kept, probability, strict=True):
        result[token] = share
        mass += share
        if mass >= top_p:
            break
    return result / result.sum()


def chi_square_p_value(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Chance of counts at least this far off. Tokens that cannot be drawn must not have been; rare ones are pooled."""
    assert counts[probability == 0].sum() == 0, "a token outside the truncated distribution was drawn"
    expected = probability * counts.sum()
    common = expected >= 10
    observed = torch.cat((counts[common], counts[~common].sum()[None])).double()
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    cells = expected > 0
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    degrees = torch.tensor((int(cells.sum()) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic / 2).item() if degrees > 0 else 1.0


def example_logits(vocab_size: int = 40) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 2


SETTINGS = {
    "plain": (1.0, 0, 1.0),
    "hot": (3.0, 0, 1.0),
    "cold": (0.3, 0, 1.0),
    "top-k": (1.0, 7, 1.0),
    "top-k of one": (1.0, 1, 1.0),
    "top-k of all": (1.0, 40, 1.0),
    "top-k of more than all": (1.0, 1000, 1.0),
    "top-p": (1.0, 0, 0.8),
    "tiny top-p": (1.0, 0, 1e-6),
    "both": (0.6, 20, 0.95),
    "both, hot": (2.0, 10, 0.7),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_those_of_the_truncated_distribution(fresh_seed, name):
    temperature, top_k, top_p = SETTINGS[name]
    logits = example_logits()
    drawn = draw(
        logits.expand(DRAWS, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=fresh_seed,
        position=torch.arange(DRAWS),
    )
    counts = torch.bincount(drawn, minlength=len(logits))
    assert chi_square_p_value(counts, truncated(logits, temperature, top_k, top_p)) > 1e-6


def test_the_token_that_crosses_top_p_is_kept(fresh_seed):
    """0.5 + 0.3 crosses 0.6, so both are drawn; nothing is left of the others."""
    logits = torch.tensor([0.1, 0.3, 0.5, 0.1]).log()
    drawn = draw(logits.expand(20_000, -1), top_p=0.6, seed=fresh_seed, position=torch.arange(20_000))
    assert set(drawn.tolist()) == {1, 2}
    assert abs((drawn == 2).float().mean() - 0.625) < 0.02


def test_top_p_is_measured_on_what_top_k_leaves(fresh_seed):
    """Of (.4, .3, .2, .1) top-k keeps (.57, .43), and .57 already crosses top-p = .5; without top-k .4 does not."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2000, -1)
    position = torch.arange(2000)
    assert set(draw(logits, top_k=2, top_p=0.5, seed=fresh_seed, position=position).tolist()) == {0}
    assert set(draw(logits, top_p=0.5, seed=fresh_seed, position=position).tolist()) == {0, 1}


@pytest.mark.parametrize("draws_differ_by", ["seed", "position", "both"])
def test_neighbouring_seeds_and_positions_give_independent_draws(fresh_seed, draws_differ_by):
    """Chi-square of consecutive pairs against the product of the marginals, on four equally likely tokens."""
    numbers = torch.arange(DRAWS)
    seed = fresh_seed + (numbers if draws_differ_by != "position" else 0)
    position = numbers if draws_differ_by != "seed" else 5
    drawn = draw(torch.zeros(DRAWS, 4), seed=seed, position=position)
    for lag in (1, 2, 64):
        pairs = drawn[:-lag] * 4 + drawn[lag:]
        pairs = pairs[:: lag + 1]  # no draw in two pairs
        counts = torch.bincount(pairs, minlength=16)
        assert chi_square_p_value(counts, torch.full((16,), 1 / 16, dtype=torch.float64)) > 1e-6


def test_a_seed_at_one_position_is_not_another_seed_at_another():
    """Sample i + 1 of a prompt must not repeat sample i shifted by a token."""
    seed, position = torch.arange(64).repeat(64), torch.arange(64).repeat_interleave(64)
    noise = exponential_noise(seed, position, torch.zeros(64 * 64, 1, dtype=torch.int64))
    assert noise.unique().numel() > 64 * 64 - 10


def test_noise_is_exponential(fresh_seed):
    seed, position = torch.tensor([fresh_seed, -1, 2**63 - 1]), torch.tensor([0, 1, 10**6])
    for row in exponential_noise(seed, position, torch.arange(100_000).expand(3, -1)):
        assert abs(row.mean() - 1) < 0.02
        assert abs((row > 1).float().mean() - 0.3679) < 0.01
        assert abs((row < 0.01).float().mean() - 0.00995) < 0.002


@pytest.mark.parametrize("bits", [0, -1])
def test_noise_is_positive_and_finite_for_every_hash(monkeypatch, bits):
    monkeypatch.setattr(sampling, "_mix", lambda x: torch.full_like(x, bits))
    (noise,) = exponential_noise(torch.tensor([1]), torch.tensor([2]), torch.tensor([[3]]))[0]
    assert 0 < noise < torch.inf


def test_temperature_zero_takes_the_most_likely_token_and_the_smaller_id_of_two():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 1.0, 5.0, 5.0], [-1.0, -torch.inf, -2.0, -3.0]])
    for top_k, top_p in [(0, 1.0), (2, 0.5), (1, 1.0)]:
        assert draw(logits, temperature=0.0, top_k=top_k, top_p=top_p, seed=9).tolist() == [1, 0, 0]


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.45}, {"top_k": 5, "top_p": 0.55}])
def test_ties_at_the_edge_go_to_the_smaller_id(fresh_seed, settings):
    for vocab_size in (6, 1000):
        logits = torch.full((2000, vocab_size), -20.0)
        logits[:, -6:] = 0.0
        drawn = draw(logits, **settings, seed=fresh_seed, position=torch.arange(2000))
        assert set((drawn - vocab_size + 6).tolist()) == {0, 1, 2}


def test_a_draw_is_a_function_of_row_seed_and_position_alone(fresh_seed):
    """Not of the batch, the order of its rows, or the other rows' settings."""
    generator = torch.Generator().manual_seed(fresh_seed)
    rows = 200
    logits = torch.randn(rows, 300, generator=generator) * 2
    settings = {
        "temperature": torch.tensor([0.0, 0.6, 1.0, 2.0]).repeat(rows // 4),
        "top_k": torch.tensor([0, 20, 5, 299, 1]).repeat(rows // 5),
        "top_p": torch.tensor([1.0, 0.95, 0.3]).repeat(rows)[:rows],
        "seed": torch.randint(2**62, (rows,), generator=generator),
        "position": torch.randint(1000, (rows,), generator=generator),
    }
    together = draw(logits, **settings)
    assert torch.equal(draw(logits, **settings), together)
    order = torch.randperm(rows, generator=generator)
    shuffled = draw(logits[order], **{name: column[order] for name, column in settings.items()})
    assert torch.equal(shuffled, together[order])
    for row in range(rows):
        one = {name: column[row : row + 1] for name, column in settings.items()}
        assert draw(logits[row : row + 1], **one) == together[row]


def test_other_seed_or_position_gives_another_draw():
    logits = torch.zeros(1000, 1000)
    here = draw(logits, seed=torch.arange(1000), position=3)
    assert (here == draw(logits, seed=torch.arange(1000), position=4)).float().mean() < 0.02
    assert (here == draw(logits, seed=torch.arange(1000) + 1000, position=3)).float().mean() < 0.02


def test_a_wider_top_k_elsewhere_in_the_batch_changes_nothing(fresh_seed):
    """The batch decides how many candidates are looked at. With logits rounded to bf16 there are ties all over."""
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(fresh_seed)).bfloat16().float()
    logits[:, ::7] *= -1
    logits[:50] = -logits[:50].abs()
    logits[50:60, 5:] = 0.0
    settings = {"top_p": 0.9, "seed": fresh_seed, "position": torch.arange(500)}
    narrow = draw(logits, **settings, top_k=10)
    for wider in (11, 50, 999, 1000, 0):
        top_k = torch.full((500,), 10)
        top_k[77] = wider
        others = torch.arange(500) != 77
        assert torch.equal(draw(logits, **settings, top_k=top_k)[others], narrow[others])


def test_a_small_error_in_the_logits_changes_few_draws(fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = (torch.randn(20_000, 50, generator=generator) * 2).contiguous()
    noisy = logits + 0.01 * torch.randn(logits.shape, generator=generator)
    settings = {"top_k": 20, "top_p": 0.95, "seed": fresh_seed, "position": torch.arange(20_000)}
    assert (draw(logits, **settings) != draw(noisy, **settings)).float().mean() < 0.02


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}])
def test_broken_rows_give_minus_one_and_leave_the_others_alone(settings):
    healthy = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    broken = healthy.clone()
    broken[0, 7] = torch.nan
    broken[1] = -torch.inf
    broken[3, 2] = torch.inf
    drawn, logprobs = sample(broken, *columns(broken, **settings, seed=4))
    assert torch.isnan(logprobs).tolist() == [True, True, False, True]
    assert drawn[[0, 1, 3]].tolist() == [-1, -1, -1]
    assert drawn[2] == draw(healthy, **settings, seed=4)[2]


def test_tokens_of_no_probability_are_never_drawn(fresh_seed):
    logits = torch.full((5000, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, -1.0
    for settings in ({}, {"top_k": 6}, {"top_p": 0.99999}, {"temperature": 50.0}):
        drawn = draw(logits, **settings, seed=fresh_seed, position=torch.arange(5000))
        assert set(drawn.tolist()) == {2, 5}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3, "temperature": 0.6}, {"top_p": 0.7}])
def test_log_probabilities_are_those_of_the_model(fresh_seed, settings):
    """Before temperature and truncation, so that they can be compared between settings; exact where p is close to 1."""
    logits = torch.randn(300, 100, generator=torch.Generator().manual_seed(fresh_seed)) * 4
    tokens, logprobs = sample(logits, *columns(logits, **settings, seed=fresh_seed, position=torch.arange(300)))
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (logprobs - expected).abs().max() < 1e-5


def test_logits_of_another_form_are_refused():
    good = torch.zeros(2, 5)
    for bad in (good.bfloat16(), good[0], good.T, torch.zeros(1, MAX_VOCAB_SIZE + 1), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"^(logits must be|a vocabulary of)"):
            draw(bad)


def test_an_empty_batch_gives_no_tokens():
    assert draw(torch.zeros(0, 5)).shape == (0,)
