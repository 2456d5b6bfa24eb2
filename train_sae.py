"""Train sparse autoencoders on captured activations: the same as `flux-ir train-sae`."""

import sys

from flux_ir.commands.train_sae import main

if __name__ == "__main__":
    sys.exit(main())
