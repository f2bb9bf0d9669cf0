"""Rows of data sets as people have them, by format."""


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION = message("user", "Where is Paris?")


SAMPLE = {
    "prompt": "Where is Oslo?",
    "prefix": "",
    "reply": "In Norway.",
    "drafts": [],
    "resets": 0,
    "finish_reason": "stop",
}


PREFERENCE = {"prompt": "Where is Paris?", "chosen": "In France.", "rejected": "No idea."}


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is Paris?\n\nAssistant: In France.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is Paris?\n\nAssistant: No idea.",
}


def oasst(message_id: str, parent_id: str | None, text: str, rank: int | None = None, **changes) -> dict:
    role = "assistant" if parent_id else "prompter"
    row = {"message_id": message_id, "parent_id": parent_id, "role": role, "text": text, "lang": "en", "rank": rank}
    return row | changes


OASST = [
    oasst("q", None, "Where is Paris?"),
    oasst("a", "q", "No idea.", rank=2),
    oasst("b", "q", "In France.", rank=0),
    oasst("c", "q", "In Europe.", rank=1),
]
