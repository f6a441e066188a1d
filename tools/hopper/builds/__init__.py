"""Every Triton kernel that a bf16 model launches on a GPU, in every configuration in which it is launched."""

from tools.hopper.builds.build import Build
from tools.hopper.builds.head import divergence_builds, head_builds
from tools.hopper.builds.layer import gate_builds, linear_builds, norm_builds, rotation_builds
from tools.hopper.builds.pages import paged_attention_builds


def builds() -> list[Build]:
    """Return the builds of all kernels: language-model head, norms, RoPE, SwiGLU, matmuls, paged cache and
    attention."""
    return [
        *head_builds(),
        *divergence_builds(),
        *norm_builds(),
        *rotation_builds(),
        *gate_builds(),
        *linear_builds(),
        *paged_attention_builds(),
    ]
