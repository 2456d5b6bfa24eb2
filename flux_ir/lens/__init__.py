"""Reading a block's output as if it were the last block's: `readout` for latents, `decode` for pictures, `measures`."""
