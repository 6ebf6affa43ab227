"""Train the embedded model on a reward of one's own: bluer pictures.

python examples/own_reward.py [SECTION.KEY=VALUE]...
"""

import sys

import entroflow


def blue(images, prompts, metadata):
    """How much bluer than red and green each image [n, 3, H, W] is on average, in [-1, 1]."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return blue - (red + green) / 2


if __name__ == "__main__":
    run = entroflow.train("quickstart", ["run.iterations=20", *sys.argv[1:]], reward=blue)
    for line in run.metrics():
        if "eval/reward" in line:
            print(f"iteration {line['iteration']:>3}  blue {line['eval/reward']:+.4f}")
    print(f"report  {run.path / 'report.html'}")
