"""What synth.py asks, keeps and counts: rules for texts, photographs, regions, SAM 3, ranks,
checks."""
