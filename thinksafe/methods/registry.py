"""All methods by the name that a recipe gives them in `method.type`."""

from thinksafe.methods.base import Method
from thinksafe.methods.direct_refusal import DirectRefusal
from thinksafe.methods.dpo import Dpo
from thinksafe.methods.filter_only import FilterOnly
from thinksafe.methods.rejection_sampling import RejectionSampling
from thinksafe.methods.safechain import SafeChain
from thinksafe.methods.safekey import SafeKey
from thinksafe.methods.safepath import SafePath
from thinksafe.methods.sft import Sft
from thinksafe.methods.star1 import Star1
from thinksafe.methods.teacher import Teacher
from thinksafe.methods.thinksafe import ThinkSafe

METHODS: dict[str, type[Method]] = {
    kind.type: kind
    for kind in (
        ThinkSafe,
        FilterOnly,
        RejectionSampling,
        Teacher,
        Dpo,
        DirectRefusal,
        SafeChain,
        Star1,
        SafeKey,
        SafePath,
        Sft,
    )
}
"""Class of the section `method` by its key `type`."""
