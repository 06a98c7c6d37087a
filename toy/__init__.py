"""The toy world: the whole method in minutes, on a CPU, with nothing to download.

scenes.py           drawn scenes with questions, of which nothing has to be labelled
tiny.py             a real Qwen3.5 with 0.4M weights, and a tokenizer that knows the world's words
base.py             its base training: it learns to read crops well and full images badly
demonstration.py    what `train.py --toy` changes, draws and trains before its run
table.py            every teacher, objective and baseline of train.py on several seeds
__main__.py         `python -m toy`: draws triplets, or makes the table
"""
