"""A collection from a model whose blocks are streamed is that of a resident one."""

from flux_ir import collect


def test_the_shards_have_the_same_bytes(tmp_path):
    prompts = ["a red circle", "a blue square", "a green star"]
    folders = []
    for number, offload in enumerate((False, "blocks")):
        folder = tmp_path / str(number)
        collect(
            prompts,
            ["t5.1", "clip.0", "double.1.img", "single.3"],
            folder,
            model="flux-tiny",
            num_steps=2,
            save_images=True,
            offload=offload,
        )
        folders.append(folder)
    shards = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in folders]
    assert shards[0] == shards[1]
    assert any("shards" in str(path) for path in shards[0])
    for path in shards[0]:
        assert (folders[0] / path).read_bytes() == (folders[1] / path).read_bytes(), path
