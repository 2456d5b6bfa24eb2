"""`flux-ir plan`: the tables it prints, and its answers to wrong flags."""

from flux_ir.commands.plan import main


def test_the_settings_of_one_machine_with_the_best_one_and_its_command(capsys):
    assert main(["--gpu", "RTX 4090", "--memory_gb", "64", "--width", "1024", "--height", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flux-schnell, 1024 x 1024 px, 4 steps, bfloat16; capture file 6.1 GB"
    assert lines[1] == "machine: 1 x 24 GB (RTX 4090), 64 GB host memory"
    assert lines[2].split() == ["setting", "GPU", "host", "s/step", "limited", "by", "fits"]
    fits = {line.partition("  ")[0]: line.rpartition(" ")[2] for line in lines[3:10]}
    assert (fits["resident"], fits["offload parts"]) == ("no", "no")
    assert [name for name, word in fits.items() if word == "best"] == ["offload blocks, 49 of 57 stay"]
    assert (fits["nf4"], fits["nf4, offload blocks"]) == ("no", "yes")
    assert "resident does not fit: 36.1 GB on a GPU of 24 GB" in lines
    assert lines[-3:] == [
        "to type:",
        "  flux-ir capture --model flux-schnell --width 1024 --height 1024 --offload blocks",
        "rates: RTX 4090: published peak x 0.4, not measured",
    ]


def test_where_nothing_fits_it_is_said(capsys):
    assert main(["--gpus", "0", "--memory_gb", "1"]) == 0
    assert "nothing fits: try --prompt_embeds" in capsys.readouterr().out


def test_presets_have_a_row_each(capsys):
    assert main(["--presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("1 x", "2 x", "8 x", "no GPU")) for line in lines) == 11


def test_wrong_flags_are_one_line_and_exit_code_2(capsys):
    assert main(["--gpus", "0", "--gpu", "H100"]) == 2
    assert capsys.readouterr().err == (
        "error: --vram_gb and --gpu are of a GPU: got --gpus 0 as well\nhint: leave them out, or pass --gpus 1\n"
    )
