"""
Answers VQAv2's questions about images from their captions alone: what a language model that sees no image
learns from a caption, measured by VQAv2's own accuracy (Antol et al. 2015, section 3.3).

    python data/coco/questions.py v2_Questions_Val_mscoco.zip v2_Annotations_Val_mscoco.zip

prints the accuracy, and writes answers-0.jsonl and accuracy.json into --out. torchrun spreads it over GPUs. A
killed run goes on where it was, by the same command. readme.md says where the files are.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data.coco.prepare import open_zip, read_caption_lines
from data.distributed import RANK, WORLD_SIZE, all_gather, from_first, init_process_group, run_and_exit
from data.distributed import select_device, select_dtype
from data.settings import TEXT, Count, NonNegative, read_settings, same_as_before, write_json
from vlv import load

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}


@dataclass
class QuestionsConfig:
    questions: Path  # VQAv2's zip file of questions
    answers: Path  # and of annotations
    captions: Path = Path("captions")  # JSON lines of image and caption, or a folder of such files
    llm: str = "Qwen/Qwen2.5-7B-Instruct"  # any causal LM
    shots: NonNegative = 0  # solved examples before each question, of other images
    count: Count = 5_000  # questions
    seed: NonNegative = 0  # chooses them
    batch_size: Count = 32
    out: Path = Path("answers")


def normalize(answer: str) -> str:
    """As VQAv2 does before it compares: no capitals, punctuation or articles, and number words as digits. In
    place of its table of contractions (dont is don't), apostrophes are dropped."""
    answer = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)|'", "", answer.lower())
    words = re.sub(r"[^\w\s.:%$&#*^~|]|_", " ", answer).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


def accuracy(answer: str, people: list[str]) -> float:
    """How an answer agrees with those of ten people: min(matches / 3, 1), the mean over all sets of nine."""
    matches = [normalize(other) == normalize(answer) for other in people]
    return sum(min(1, (sum(matches) - left_out) / 3) for left_out in matches) / len(people)


def read_zip(path: Path, key: str) -> list[dict]:
    """The list under `key` of the JSON file in a zip file. Raises ValueError if there is none."""
    with open_zip(path) as archive:
        for name in archive.namelist():
            values = json.loads(archive.read(name)) if name.endswith(".json") else None
            if isinstance(values, dict) and isinstance(values.get(key), list):
                return values[key]
    raise ValueError(f"{path} holds no JSON file with {key!r}: give VQAv2's zip file of {key}")


def choose(args: QuestionsConfig) -> tuple[list[dict], list[dict]]:
    """(questions, solved examples), each {"id", "caption", "question", "type", "answers", "answer": most
    people's}. Raises ValueError or OSError if something is missing."""
    captions, known = read_caption_lines(args.captions), []
    try:
        notes = {note["question_id"]: note for note in read_zip(args.answers, "annotations")}
        for question in read_zip(args.questions, "questions"):
            key, note = f"COCO_val2014_{question['image_id']:012d}", notes.get(question["question_id"])
            if key in captions and note is not None:
                answers, most = [other["answer"] for other in note["answers"]], note["multiple_choice_answer"]
                known.append(dict(id=note["question_id"], caption=captions[key], question=question["question"],
                                  type=note["answer_type"], answers=answers, answer=most))
    except KeyError as error:
        raise ValueError(f"{args.questions} and {args.answers} are not VQAv2's: {error!r}") from error
    if len(known) < args.count + args.shots:
        raise ValueError(f"there are {len(known):,} questions about the images of {args.captions}, and not"
                         f" {args.count + args.shots:,}: caption more of them, or lower --count")
    known.sort(key=lambda question: hashlib.sha256(f"{args.seed} {question['id']}".encode()).digest())
    settings = {name: getattr(args, name) for name in ("llm", "shots", "count", "seed")}
    settings["questions"] = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    same_as_before(args.out / "settings.json", settings, "choose another --out")
    return known[: args.count], known[args.count : args.count + args.shots]


def ask(question: dict, answer: str = "") -> str:
    return (f"An image: {question['caption']}\nQuestion: {question['question']}\n"
            f"Answer in one or two words:{answer}")


def read_answers(folder: Path) -> dict[int, str]:
    """{question id: answer} of all that was answered, without half lines of a killed process."""
    records = []
    for file in sorted(folder.glob("answers*.jsonl")):
        records += [json.loads(line) for line in open(file, **TEXT) if line.endswith("\n")]
    return {record["id"]: record["answer"] for record in records}


@torch.inference_mode()
def answer_all(args: QuestionsConfig, questions: list[dict], examples: list[dict], device) -> None:
    """Writes a line {"id", "answer"} for each question into this process's file."""
    dtype = select_dtype("auto", device)
    model = load(AutoModelForCausalLM, args.llm, dtype=dtype).to(device).eval()
    tokenizer = load(AutoTokenizer, args.llm)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    settings = dict(max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    beginning = "".join(ask(example, f" {example['answer']}\n\n") for example in examples)
    path = args.out / f"answers-{RANK}.jsonl"
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before[: before.rfind(b"\n") + 1])  # without half a line of a killed process
    with open(path, "a", **TEXT) as file:
        for at in tqdm(range(0, len(questions), args.batch_size), unit=" batches", disable=RANK > 0):
            batch = questions[at : at + args.batch_size]
            texts = [beginning + ask(question) for question in batch]
            tokens = tokenizer(texts, return_tensors="pt", padding=True).to(device)
            ids = model.generate(tokens.input_ids, attention_mask=tokens.attention_mask, **settings)
            new_ids = ids[:, tokens.input_ids.shape[1] :]
            for question, text in zip(batch, tokenizer.batch_decode(new_ids, skip_special_tokens=True)):
                answer = (text.strip().splitlines() or [""])[0]
                file.write(json.dumps({"id": question["id"], "answer": answer}) + "\n")
            file.flush()


def main(argv=None) -> None:
    args = read_settings(QuestionsConfig, argv, __doc__)
    device = select_device("auto")
    init_process_group(device, hours=720)  # who is done waits for the others
    questions, examples = from_first("chosen", lambda: choose(args))
    done = all_gather(read_answers(args.out))[0]
    todo = [question for question in questions if question["id"] not in done][RANK::WORLD_SIZE]
    answer_all(args, todo, examples, device)
    all_gather(None)  # the others are done, too
    if RANK > 0:
        return
    answers, scores = read_answers(args.out), defaultdict(list)
    for question in questions:
        for kind in ("all", question["type"]):
            scores[kind].append(accuracy(answers[question["id"]], question["answers"]))
    means = {kind: sum(values) / len(values) for kind, values in scores.items()}
    write_json(args.out / "accuracy.json", dict(questions=len(questions), shots=args.shots, accuracy=means))
    words = ", ".join(f"{kind} {mean:.2%}" for kind, mean in means.items())
    print(f"{len(questions):,} questions, {args.shots} shots: {words}")


if __name__ == "__main__":
    run_and_exit(main)
