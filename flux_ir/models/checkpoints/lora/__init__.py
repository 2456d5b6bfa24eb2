"""LoRAs: small files of changes to a network's weights, merged into them when they are loaded (`load.Weights`).

`names` says which weight a layer of a file changes, in every spelling there is; `changes` computes the change;
`contents` holds a file against a network; `read` opens it and checks all of it. A LoRA is W + strength * scale *
(up @ down) (Hu et al., 2021); DoRA, LoKr and LoHa are read as well.
"""
