"""Push a slim model with its card to the Hub, and load it again from there, as somebody else would.

    python examples/push.py --model slim --repo_id org/my-slim-bert --private

`hf-costeff push` does the first half from the command line. Log in first: `hf auth login`.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_costeff.hub import push_folder
from hf_costeff.model_card import write_model_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of a slim model.")
    parser.add_argument("--repo_id", required=True, help="org/name; made if it is not there.")
    parser.add_argument("--license", help="The Hub's name of the licence, e.g. apache-2.0.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--text", default="a gripping film.", help="Asked of the pushed model.")
    given = parser.parse_args()

    write_model_card(given.model, given.repo_id, given.license)  # with the name it has from now on
    commit = push_folder(given.model, given.repo_id, private=given.private or None)
    print(f"Pushed to {commit.commit_url}")

    name = commit.repo_url.repo_id  # a bare name becomes that of your account
    model = AutoModelForSequenceClassification.from_pretrained(name, revision=commit.oid)  # or a branch or tag
    tokenizer = AutoTokenizer.from_pretrained(name, revision=commit.oid)
    answer = model.predict(**tokenizer(given.text, return_tensors="pt"))
    label = model.config.id2label[int(answer.logits.argmax())]
    print(f"{label}, after layer {int(answer.exit_layer)} of {model.config.num_hidden_layers}: {given.text}")


if __name__ == "__main__":
    main()
