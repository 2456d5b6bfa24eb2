"""What a transformer computes, recorded into a file or changed.

`recorder` listens and `intervention` changes, both by `hooks`; `plan` says what a capture holds, `writer` and `reader`
have the file, in the `file_format` of torch.save.
"""
