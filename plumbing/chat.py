"""The chat template: the text and the tokens of a prompt, and the token that ends a turn.

What it does    writes messages in a tokenizer's chat template, a program in Jinja that its makers
                wrote; encodes them so that no words of a message become a special token; finds out
                what ends the assistant's turn.
Not here        which messages: rewards.py, evaluation/judge.py. torch is never imported.
Where to fork   a model without a chat template: `chat_text`.
"""
import re

# Qwen3 thinks aloud first unless told not to; Llama 3's prompt names today's date unless given one.
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}  # Llama 3.2's default
BREAK = "\ufdd0"  # a noncharacter of Unicode, which no text holds
# Words that no template changes: digits have no case, and no blanks to strip.
SYSTEM, QUESTION, ANSWER, NEXT = "135791357913", "246802468024", "192837465510", "564738291056"


def chat_text(tokenizer, messages):
    """The text of messages up to where the assistant begins.

    Raises ValueError where there is no tokenizer, or none whose chat template can be used.
    """
    if tokenizer is None:
        raise ValueError("the model's folder has no tokenizer; expected tokenizer.json and "
                         "tokenizer_config.json beside config.json")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat "
                         "template, which the prompt is written in; set its chat_template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                             **TEMPLATE_SETTINGS)
    except Exception as e:  # a template is a program in Jinja
        roles = " and a ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template of {tokenizer.name_or_path} fails with a {roles} "
                         f"message: {e}") from e


def chat_ids(tokenizer, messages):
    """Token ids of `chat_text`, a list of int; <|im_end|> within a message is text, and ends no
    turn.

    Where a message names a special token, a BREAK is set into the name; the text is cut at every
    BREAK, and the parts are encoded one by one, so that no name is whole.
    The text is encoded here: apply_chat_template(tokenize=True) gives a list in some versions of
    transformers and a dictionary in others. The template writes the special tokens itself.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    names = sorted((name for name in added if len(name.strip()) > 1), key=len, reverse=True)
    # a template may change the case of a message, so that <|IM_END|> becomes a token
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)", re.IGNORECASE)
    text = chat_text(tokenizer, [
        {**message, "content": pattern.sub(lambda m: m[0][0] + BREAK + m[0][1:],
                                           message["content"])} for message in messages])
    return [i for part in text.split(BREAK)
            for i in tokenizer.encode(part, add_special_tokens=False)]


def end_of_turn(tokenizer):
    r"""The id that ends the assistant's turn, or None: <|im_end|> of "A<|im_end|>\n<|im_start|>…".

    It is the first special token between the assistant's words and the next user's, unless this
    token begins a turn. (The last turn says less: some templates leave it open.)
    Raises ValueError where the template fails.
    """
    found = re.search(rf"(.*?)(?:{SYSTEM}(.*?))?{QUESTION}(.*?){ANSWER}(.*?)(?:{NEXT}|\Z)",
                      conversation(tokenizer), re.DOTALL)
    if not found:  # the template leaves out or rewrites what is said
        return None
    added = tokenizer.added_tokens_decoder
    first, before_question, before_answer, after_answer = (
        [i for i in tokenizer.encode(part or "", add_special_tokens=False)
         if i in added and tokenizer.decode([i]).strip()]  # Gemma's "\n" is one of them
        for part in found.groups())
    if not after_answer:
        return None
    end, *others = after_answer
    everybodys = end in before_answer  # also of the user's turn
    if end in first:  # it begins turns, unless a whole turn of the template's own is before it
        ends = everybodys and others and set(others) <= set(first[:first.index(end)])
    else:  # what a question has before it, and an answer has not, begins the user's turn
        ends = everybodys or end not in before_question
    return end if ends else None


def conversation(tokenizer):
    """The text of a conversation: as much of it as the template takes."""
    turns = [{"role": role, "content": words} for role, words in (
        ("system", SYSTEM), ("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))]
    for part in (turns, turns[1:], turns[1:3]):
        try:
            return tokenizer.apply_chat_template(part, tokenize=False)
        except Exception as e:  # a template is a program in Jinja
            fault = e
    raise ValueError(f"the chat template of {tokenizer.name_or_path} fails: {fault}") from fault
