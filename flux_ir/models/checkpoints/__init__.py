"""From a name to weights: `locate` says in which order sources are asked, `inspect` what a file is, `load` loads it.

Text encoders have `locate_text` and `pretrained`, what is merged into a transformer has `lora`, and
`quantised` keeps its blocks as codes. Below:
`keymap` (names of diffusers), `headers`, `paths`, `hub`.
"""
