"""How weights come about. `step` is the whole of it; `optimiser`, `schedules` and `resample` are its parts."""
