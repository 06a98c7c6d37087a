"""How a command starts: its environment, its flags."""
