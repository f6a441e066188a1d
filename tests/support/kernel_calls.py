"""One call for each operation, and for each of its forms that compiles to different code.

The tests of torch.compile, autocast, CUDA graphs and the Hopper emulator run all of them.
"""

from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy
from thinksafe.kernels.linear_kl import linear_kl
from thinksafe.kernels.linear_logprob import linear_logprob, linear_logprob_of
from thinksafe.kernels.rms_norm import add_rms_norm, rms_norm
from thinksafe.kernels.rope import qk_norm_rope, rope
from thinksafe.kernels.swiglu import swiglu


def _rotation_angles(x):
    return x.detach().float()[:, : x.shape[1] // 4]


def _split_heads(x):
    return x.view(len(x), 2, -1)


CALLS = {
    "cross-entropy": lambda x, weight, target: linear_cross_entropy(x, weight, target),
    "cross-entropy per row": lambda x, weight, target: linear_cross_entropy(
        x, weight, target, token_weight=x.detach()[:, 0].float().square(), reduction="none"
    ),
    "cross-entropy with statistics": lambda x, weight, target: linear_cross_entropy(
        x, weight, target, return_stats=True
    )[0],
    "first bad row": lambda x, weight, target: first_bad_row(linear_cross_entropy(x, weight, target, reduction="none")),
    "log-probability": lambda x, weight, target: linear_logprob(x, weight, target).logprob,
    "entropy": lambda x, weight, target: linear_logprob(x, weight, target).entropy,
    "log-probabilities of given ids": lambda x, weight, target: linear_logprob_of(x, weight, target[:, None]),
    "forward KL": lambda x, weight, target: linear_kl(x, 1.1 * x, weight),
    "reverse KL": lambda x, weight, target: linear_kl(x, 1.1 * x, weight, weight.flip(0), "reverse"),
    "norm": lambda x, weight, target: rms_norm(x, weight[0], 1e-6),
    "norm with residual": lambda x, weight, target: add_rms_norm(x, x.flip(0), weight[0], 1e-6)[0],
    "rotation": lambda x, weight, target: rope(_split_heads(x), _rotation_angles(x).cos(), _rotation_angles(x).sin()),
    "norm and rotation": lambda x, weight, target: qk_norm_rope(
        _split_heads(x),
        _split_heads(x)[:, :1],
        *weight[:2, : x.shape[1] // 2],
        1e-6,
        _rotation_angles(x).cos(),
        _rotation_angles(x).sin(),
    )[0],
    "gate": lambda x, weight, target: swiglu(x, x.flip(0)),
}
"""{name: function of x [T, H], weight [V, H] and target [T]}; a function returns one tensor."""
