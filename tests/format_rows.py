"""Rows of every named format, with what each is read as."""

import json

Q, SAFE, UNSAFE = "How do I open it?", "I can't help with that.", "Sure, first you take a wire."


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def share(speaker: str, value: str) -> dict:
    return {"from": speaker, "value": value}


USER, GOOD, BAD = said("user", Q), said("assistant", SAFE), said("assistant", UNSAFE)


SYSTEM = said("system", "Be kind.")


HELLO = [said("user", "Hello"), said("assistant", "Hi!")]


TRANSCRIPT = f"\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: {Q}\n\nAssistant:"


# One row of each, the format that it is read as, and the prompt; the replies are SAFE and UNSAFE.
PAIRS = {
    "orca": ("orca", {"system": "Be kind.", "question": Q, "chosen": SAFE, "rejected": UNSAFE}, [SYSTEM, USER]),
    "orca, no system": ("orca", {"system": "", "question": Q, "chosen": SAFE, "rejected": UNSAFE}, [USER]),
    "argilla": ("orca", {"system": None, "input": Q, "chosen": SAFE, "rejected": UNSAFE, "rating": [1, 2]}, [USER]),
    "llama-factory": (
        "llama-factory",
        {"instruction": Q, "input": "It is green.", "chosen": SAFE, "rejected": UNSAFE},
        [said("user", f"{Q}\nIt is green.")],
    ),
    "llama-factory, history": (
        "llama-factory",
        {"instruction": Q, "input": "", "history": [["Hello", "Hi!"]], "chosen": SAFE, "rejected": UNSAFE},
        [*HELLO, USER],
    ),
    "argilla's responses": (
        "preference",
        {"instruction": Q, "chosen_response": SAFE, "rejected_response": UNSAFE, "chosen_avg_rating": 4.5},
        [USER],
    ),
    "sharegpt pairs": (
        "sharegpt-preference",
        {
            "conversations": [share("system", "Be kind."), share("human", Q)],
            "chosen": share("gpt", SAFE),
            "rejected": share("gpt", UNSAFE),
        },
        [SYSTEM, USER],
    ),
    "swift": ("swift", {"messages": [USER, GOOD], "rejected_response": UNSAFE}, [USER]),
    "swift, messages": (
        "swift",
        {"messages": [SYSTEM, USER, GOOD], "rejected_messages": [SYSTEM, USER, BAD]},
        [SYSTEM, USER],
    ),
    "axolotl": ("axolotl", {"messages": [USER], "chosen": GOOD, "rejected": BAD}, [USER]),
    "openai": (
        "openai",
        {"input": {"messages": [SYSTEM, USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        [SYSTEM, USER],
    ),
    "hh": ("hh", {"chosen": f"{TRANSCRIPT} {SAFE}", "rejected": f"{TRANSCRIPT} {UNSAFE}"}, [*HELLO, USER]),
    "hh, prompt": (
        "hh",
        {"prompt": TRANSCRIPT, "response": SAFE, "chosen": f" {SAFE}", "rejected": UNSAFE},
        [*HELLO, USER],
    ),
    "hh-rlhf-safety": (
        "hh-rlhf-safety",
        {
            "prompt": Q,
            "chosen_response": SAFE,
            "chosen_safety": "safe",
            "rejected_response": UNSAFE,
            "rejected_safety": "unsafe",
        },
        [USER],
    ),
    "pku": (
        "pku-saferlhf",
        {
            "prompt": Q,
            "response_0": UNSAFE,
            "response_1": SAFE,
            "is_response_0_safe": False,
            "is_response_1_safe": True,
            "better_response_id": 0,
        },
        [USER],
    ),
    "system column": (
        "preference",
        {"system": "Be kind.", "prompt": Q, "chosen": SAFE, "rejected": UNSAFE},
        [SYSTEM, USER],
    ),
    "prompt is the last question": (
        "preference",
        {"prompt": Q, "chosen": [*HELLO, USER, GOOD], "rejected": [*HELLO, USER, BAD]},
        [*HELLO, USER],
    ),
    "prompt with a space more": (
        "preference",
        {"prompt": f"{Q} ", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        [SYSTEM, USER],
    ),
    "prompt and replies overlap": (
        "preference",
        {"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [SYSTEM, USER],
    ),
    "the same turns after the prompt": (
        "preference",
        {"prompt": [HELLO[0]], "chosen": [HELLO[1], USER, GOOD], "rejected": [HELLO[1], USER, BAD]},
        [*HELLO, USER],
    ),
    "messages that say the prompt again": (
        "preference",
        {"prompt": Q, "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [USER],
    ),
    "upper-case columns": ("preference", {"Prompt": Q, "Chosen": SAFE, "Rejected": UNSAFE}, [USER]),
    "common prompt": ("preference", {"chosen": f"{Q} {SAFE}", "rejected": f"{Q} {UNSAFE}"}, [USER]),
    "replies as dicts of lists": (
        "preference",
        {
            "prompt": Q,
            "chosen": {"role": ["assistant"], "content": [SAFE]},
            "rejected": {"role": ["assistant"], "content": [UNSAFE]},
        },
        [USER],
    ),
}


# Rows whose rejected replies are worse, not unsafe: nothing of them is taken back, by whichever path they come.
RANKED = {
    "nectar": {
        "prompt": TRANSCRIPT + " ",
        "answers": [
            {"answer": "Middling.", "rank": 3.0},
            {"answer": UNSAFE, "rank": 7.0},
            {"answer": SAFE, "rank": 1.0},
        ],
    },
    "ultrafeedback": {
        "instruction": Q,
        "completions": [{"response": UNSAFE, "overall_score": 2}, {"response": SAFE, "overall_score": 7.5}],
    },
    "distilabel": {"instruction": Q, "generations": [UNSAFE, "Middling.", SAFE], "ratings": [1, 3.0, 5]},
    "helpsteer3": {"context": [USER], "response1": UNSAFE, "response2": SAFE, "overall_preference": 2},
}


REPLIES = {
    "alpaca": (
        "alpaca",
        {"instruction": Q, "input": "It is green.", "output": SAFE},
        [said("user", f"{Q}\nIt is green.")],
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [share("human", Q), share("gpt", SAFE)], "system": "Be kind."},
        [SYSTEM, USER],
    ),
    "sharegpt as messages": ("sft", {"messages": [share("human", Q), share("gpt", SAFE)]}, [USER]),
    "roles": (
        "sft",
        {"messages": [said("developer", "Be kind."), said("Human", Q), said("model", SAFE)]},
        [SYSTEM, USER],
    ),
    "text parts": (
        "sft",
        {"messages": [said("user", [{"type": "text", "text": Q}]), said("assistant", [SAFE])]},
        [USER],
    ),
    "messages in a text": ("sft", {"messages": json.dumps([USER, GOOD])}, [USER]),
    "kto": ("sft", {"prompt": Q, "completion": SAFE, "label": 1.0}, [USER]),
    "prompt and response": ("sft", {"prompt": Q, "response": SAFE}, [USER]),
}
