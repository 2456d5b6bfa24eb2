"""Reading a block's output as if it were the last block's: `readout` gives latents, `decode` pictures, `measures` numbers."""
