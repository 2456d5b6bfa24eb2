"""`python -m flux_ir VERB --flag value`: the same as `flux-ir VERB`, and what `torchrun -m` starts."""

import sys

from flux_ir.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
