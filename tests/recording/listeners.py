"""What tests of the recorder share: every site of a network, its hooks counted, and a listener that fails."""

from flux_ir.recording.recorder import MemorySink
from flux_ir.sites import all_sites

TXT_TOKENS, IMG_TOKENS = 7, 12


def every_site(model):
    return all_sites(model.params.depth, model.params.depth_single_blocks)


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    with_kwargs = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds + with_kwargs)


class Failing(MemorySink):
    """Fails at the n-th site."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = at, error

    def write(self, step, site, value):
        self.left -= 1
        if self.left < 0:
            raise self.error
        super().write(step, site, value)
