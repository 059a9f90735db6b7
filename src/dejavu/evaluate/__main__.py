"""The harness's own command line with our model in it.

Example: python -m dejavu.evaluate --model dejavu --model_args pretrained=opt-mini,pack=opt-mini --tasks piqa
"""

import dejavu.evaluate.harness  # noqa: F401  registers the model

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
