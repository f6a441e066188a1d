"""Every kernel that is launched on a GPU for bf16 models, in every configuration it is launched in."""

from tools.hopper.builds.build import Build
from tools.hopper.builds.head import divergence_builds, head_builds
from tools.hopper.builds.layer import gate_builds, norm_builds, rotation_builds, row_linear_builds
from tools.hopper.builds.pages import paged_attention_builds


def builds() -> list[Build]:
    """All of them, by what they belong to."""
    return [
        *head_builds(),
        *divergence_builds(),
        *norm_builds(),
        *rotation_builds(),
        *gate_builds(),
        *row_linear_builds(),
        *paged_attention_builds(),
    ]
