"""Sample one picture with FLUX.1, record what every block put out, and decode it: the same as `flux-ir capture`."""

import sys

from flux_ir.commands.capture import main

if __name__ == "__main__":
    sys.exit(main())
