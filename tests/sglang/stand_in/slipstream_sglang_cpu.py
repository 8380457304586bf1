"""A plugin of SGLang: takes this CPU for one with AMX, so that `--attention-backend intel_amx` is kept.

The two attention ops of that backend come from the stand-in `sgl_kernel`. Norms, rope, linear layers and activations
ask the CPU itself and go on using torch.
"""

from sglang.srt.runtime_context import get_platform


def load() -> None:
    get_platform()._install(has_amx=True)
