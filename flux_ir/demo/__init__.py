"""The world that flux-tiny knows: scenes, their pictures and captions, and a judge of pictures. Start with `scenes`."""
