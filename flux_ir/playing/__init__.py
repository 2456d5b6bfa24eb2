"""A local page to play on: the work behind it (`studio`), the page (`page`), and who serves it (`server`)."""
