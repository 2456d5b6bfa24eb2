"""Make a film or a contact sheet of what each block would have drawn: the same as `flux-ir visualize`."""

import sys

from flux_ir.commands.visualize import main

if __name__ == "__main__":
    sys.exit(main())
