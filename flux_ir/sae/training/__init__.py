"""How weights come about. `step` is one optimiser step, with `optimiser` and `schedules`; `checkpoints` saves it."""
