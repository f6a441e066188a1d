"""Tokens are sampled from exactly the truncated distribution, and depend on their row, seed and position only.

The oracles are a loop in fp64 with a chi-square test, and equality of bits, also with a form that sorts every token.
"""

import pytest
import torch

from benchmarks.sampling import sample_by_sorting
from tests.support.sampling import row_settings
from thinksafe.kernels import sampling
from thinksafe.kernels.sampling import MAX_VOCAB_SIZE, exponential_noise, sample

DRAWS = 100_000


def draw(logits, **settings) -> torch.Tensor:
    return sample(logits, *row_settings(logits, **settings))[0]


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Return the truncated distribution in fp64: the top_k most likely tokens, cut where their sum reaches top_p."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    candidates = ranked[: top_k or None]
    probability = (logits[candidates].double() / temperature).softmax(-1).tolist()
    result, mass = torch.zeros(len(logits), dtype=torch.float64), 0.0
    for token, share in zip(candidates, probability, strict=True):
        result[token] = share
        mass += share
        if mass >= top_p:
            break
    return result / result.sum()


def chi_square_p_value(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Return the probability of counts at least this far from their expectation; rare tokens are pooled.

    Raises:
        AssertionError: a token of probability 0 was drawn.
    """
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
def test_frequencies_match_the_truncated_distribution(fresh_seed, name):
    temperature, top_k, top_p = SETTINGS[name]
    logits = example_logits()
    tokens = draw(
        logits.expand(DRAWS, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=fresh_seed,
        position=torch.arange(DRAWS),
    )
    counts = torch.bincount(tokens, minlength=len(logits))
    assert chi_square_p_value(counts, truncated(logits, temperature, top_k, top_p)) > 1e-6


def test_token_that_crosses_top_p_is_kept(fresh_seed):
    """0.5 + 0.3 crosses 0.6, so exactly these two tokens are drawn."""
    logits = torch.tensor([0.1, 0.3, 0.5, 0.1]).log()
    tokens = draw(logits.expand(20_000, -1), top_p=0.6, seed=fresh_seed, position=torch.arange(20_000))
    assert set(tokens.tolist()) == {1, 2}
    assert abs((tokens == 2).float().mean() - 0.625) < 0.02


def test_top_p_applies_to_the_renormalized_top_k(fresh_seed):
    """Top-k turns (.4, .3, .2, .1) into (.57, .43), and .57 alone crosses top_p = .5. Without top-k .4 does not."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2000, -1)
    position = torch.arange(2000)
    assert set(draw(logits, top_k=2, top_p=0.5, seed=fresh_seed, position=position).tolist()) == {0}
    assert set(draw(logits, top_p=0.5, seed=fresh_seed, position=position).tolist()) == {0, 1}


@pytest.mark.parametrize("draws_differ_by", ["seed", "position", "both"])
def test_neighboring_seeds_and_positions_give_independent_draws(fresh_seed, draws_differ_by):
    """On four equally likely tokens, pairs of draws pass a chi-square test against 16 equally likely pairs."""
    numbers = torch.arange(DRAWS)
    seed = fresh_seed + (numbers if draws_differ_by != "position" else 0)
    position = numbers if draws_differ_by != "seed" else 5
    tokens = draw(torch.zeros(DRAWS, 4), seed=seed, position=position)
    for lag in (1, 2, 64):
        pairs = tokens[:-lag] * 4 + tokens[lag:]
        pairs = pairs[:: lag + 1]  # no draw is in two pairs
        counts = torch.bincount(pairs, minlength=16)
        assert chi_square_p_value(counts, torch.full((16,), 1 / 16, dtype=torch.float64)) > 1e-6


def test_noise_differs_for_every_seed_and_position():
    """Otherwise sample i + 1 of a prompt could repeat sample i, shifted by a token."""
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
def test_noise_of_the_extreme_hashes_is_positive_and_finite(monkeypatch, bits):
    monkeypatch.setattr(sampling, "splitmix64", lambda x: torch.full_like(x, bits))
    (noise,) = exponential_noise(torch.tensor([1]), torch.tensor([2]), torch.tensor([[3]]))[0]
    assert 0 < noise < torch.inf


def test_temperature_zero_takes_the_first_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 1.0, 5.0, 5.0], [-1.0, -torch.inf, -2.0, -3.0]])
    for top_k, top_p in [(0, 1.0), (2, 0.5), (1, 1.0)]:
        assert draw(logits, temperature=0.0, top_k=top_k, top_p=top_p, seed=9).tolist() == [1, 0, 0]


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.45}, {"top_k": 5, "top_p": 0.55}])
def test_ties_at_the_cutoff_go_to_the_smaller_id(fresh_seed, settings):
    for vocab_size in (6, 1000):
        logits = torch.full((2000, vocab_size), -20.0)
        logits[:, -6:] = 0.0
        tokens = draw(logits, **settings, seed=fresh_seed, position=torch.arange(2000))
        assert set((tokens - vocab_size + 6).tolist()) == {0, 1, 2}


def test_draw_does_not_depend_on_the_batch(fresh_seed):
    """The number and order of the rows and the settings of other rows do not change a draw."""
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
    batch_draws = draw(logits, **settings)
    assert torch.equal(draw(logits, **settings), batch_draws)
    order = torch.randperm(rows, generator=generator)
    shuffled = draw(logits[order], **{name: column[order] for name, column in settings.items()})
    assert torch.equal(shuffled, batch_draws[order])
    for row in range(rows):
        own_settings = {name: column[row : row + 1] for name, column in settings.items()}
        assert draw(logits[row : row + 1], **own_settings) == batch_draws[row]


def test_another_seed_or_position_gives_another_draw():
    logits = torch.zeros(1000, 1000)
    baseline = draw(logits, seed=torch.arange(1000), position=3)
    assert (baseline == draw(logits, seed=torch.arange(1000), position=4)).float().mean() < 0.02
    assert (baseline == draw(logits, seed=torch.arange(1000) + 1000, position=3)).float().mean() < 0.02


def test_top_k_of_another_row_changes_no_draw(fresh_seed):
    """The largest top_k of the batch sets the number of candidates. Logits rounded to bf16 have many ties."""
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(fresh_seed)).bfloat16().float()
    logits[:, ::7] *= -1
    logits[:50] = -logits[:50].abs()
    logits[50:60, 5:] = 0.0
    settings = {"top_p": 0.9, "seed": fresh_seed, "position": torch.arange(500)}
    narrow = draw(logits, **settings, top_k=10)
    for wider in (11, 50, 999, 1000, 0):
        top_k = torch.full((500,), 10)
        top_k[77] = wider
        other_rows = torch.arange(500) != 77
        assert torch.equal(draw(logits, **settings, top_k=top_k)[other_rows], narrow[other_rows])


def test_small_errors_of_logits_change_few_draws(fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = (torch.randn(20_000, 50, generator=generator) * 2).contiguous()
    noisy = logits + 0.01 * torch.randn(logits.shape, generator=generator)
    settings = {"top_k": 20, "top_p": 0.95, "seed": fresh_seed, "position": torch.arange(20_000)}
    assert (draw(logits, **settings) != draw(noisy, **settings)).float().mean() < 0.02


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}])
def test_non_finite_rows_give_minus_one_and_change_no_other(settings):
    healthy_logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    broken_logits = healthy_logits.clone()
    broken_logits[0, 7] = torch.nan
    broken_logits[1] = -torch.inf
    broken_logits[3, 2] = torch.inf
    tokens, logprobs = sample(broken_logits, *row_settings(broken_logits, **settings, seed=4))
    assert torch.isnan(logprobs).tolist() == [True, True, False, True]
    assert tokens[[0, 1, 3]].tolist() == [-1, -1, -1]
    assert tokens[2] == draw(healthy_logits, **settings, seed=4)[2]


def test_tokens_of_probability_zero_are_never_drawn(fresh_seed):
    logits = torch.full((5000, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, -1.0
    for settings in ({}, {"top_k": 6}, {"top_p": 0.99999}, {"temperature": 50.0}):
        tokens = draw(logits, **settings, seed=fresh_seed, position=torch.arange(5000))
        assert set(tokens.tolist()) == {2, 5}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3, "temperature": 0.6}, {"top_p": 0.7}])
def test_logprobs_do_not_include_temperature_and_truncation(fresh_seed, settings):
    """So log-probabilities of different settings are comparable. They are precise where p is close to 1."""
    logits = torch.randn(300, 100, generator=torch.Generator().manual_seed(fresh_seed)) * 4
    tokens, logprobs = sample(logits, *row_settings(logits, **settings, seed=fresh_seed, position=torch.arange(300)))
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (logprobs - expected).abs().max() < 1e-5


def test_invalid_logits_raise_value_error():
    valid_logits = torch.zeros(2, 5)
    for invalid_logits in (
        valid_logits.bfloat16(),
        valid_logits[0],
        valid_logits.T,
        torch.zeros(1, MAX_VOCAB_SIZE + 1),
        torch.zeros(2, 0),
    ):
        with pytest.raises(ValueError, match=r"^logits must (be fp32|have 1 to)"):
            draw(invalid_logits)


@pytest.mark.parametrize("vocab_size", [5, 20_000])
def test_empty_batch_gives_no_tokens(vocab_size):
    assert draw(torch.zeros(0, vocab_size)).shape == (0,)


def odd_logits(vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Return logits [13, vocab_size], one row for each kind that sampling without sorting could get wrong."""
    rows = torch.randn(13, vocab_size, generator=generator) * 2
    rows[0] = rows[0].bfloat16().float()  # ties everywhere
    rows[1] = rows[1].round()
    rows[2] = 0.0
    rows[3] = rows[3].sign() * 0.0  # 0 and -0
    rows[4] *= 1e-4  # weights that differ by less than an interval
    rows[5] = rows[5] * 1e-9 + 5.0  # neighbors in fp32
    rows[6] *= 100  # all weights but a few are 0
    rows[7, torch.rand(vocab_size, generator=generator) < 0.9] = -torch.inf
    rows[8, 1:] = -torch.inf
    rows[9, -1] = 100.0  # the last token, outside the blocks of `_top_k`
    rows[10, vocab_size // 2] = torch.nan
    rows[11, 3] = torch.inf
    rows[12] = -torch.inf
    return rows


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 500, 8192, 8193, 20_011])
@pytest.mark.parametrize("top_k", ["none", "all", "some"])
def test_tokens_and_logprobs_equal_those_of_sorting(fresh_seed, vocab_size, top_k):
    """Bit for bit, on ties, on rows that are not finite and at extreme settings."""
    generator = torch.Generator().manual_seed(fresh_seed)
    logits = odd_logits(max(vocab_size, 4), generator)[:, :vocab_size].repeat_interleave(3, 0)

    def choose(*values: float) -> list[float]:
        return [values[i] for i in torch.randint(len(values), (len(logits),), generator=generator)]

    for _ in range(6):
        some_k = choose(1, 1, 2, 20, 50, 300, max(vocab_size - 1, 1))
        ks = {"none": choose(0, vocab_size, 10**9), "all": some_k, "some": choose(0, *some_k)}
        settings = row_settings(
            logits,
            temperature=choose(0.0, 0.6, 1.0, 1.0, 1e-30, 1e-3, 50.0, 1e30),
            top_k=ks[top_k],
            top_p=choose(1.0, 0.95, 0.95, 0.5, 1e-6, 1e-40, 1 - 2**-24),
            seed=torch.randint(2**62, (len(logits),), generator=generator),
            position=torch.randint(1000, (len(logits),), generator=generator),
        )
        tokens, logprobs = sample(logits, *settings)
        expected_tokens, expected_logprobs = sample_by_sorting(logits, *settings)
        assert torch.equal(tokens, expected_tokens)
        # The sum of a single row may be split among threads.
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_equal_race_times_go_to_the_more_likely_token(monkeypatch):
    """With equal noise and a weight of 1 for all tokens, the order of the logits decides."""
    monkeypatch.setattr(sampling, "exponential_noise", lambda seed, position, ids: torch.ones(len(seed), ids.shape[-1]))
    logits = torch.zeros(1, 20_000)
    logits[0, [700, 900]] = 1e-3
    for settings in ({}, {"top_p": 0.5}, {"top_k": 50}):
        assert draw(logits, temperature=1e30, **settings).tolist() == [700]
