"""
Answers VQAv2's questions about images from their captions alone: what a language model that never sees an image learns from
a caption, measured by VQAv2's own accuracy (Antol et al. 2015, section 3.3).

    python data/coco/questions.py v2_Questions_Val_mscoco.zip v2_Annotations_Val_mscoco.zip --captions captions

prints the accuracy, and writes answers.jsonl and accuracy.json into --out. torchrun spreads it over GPUs. A killed run goes
on where it was, by the same command. readme.md says where the files are.
"""

import hashlib
import json
import re
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data.quiet import quiet  # before what imports transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from data.checkpoint import write_json
from data.pretrained import load
from data.processes import gather, leave, run, share_work, together
from data.results import TEXT, read_captions
from data.settings import Count, Seed, Settings, Text, Whole, parse_settings, same_as_before

DIGITS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}


@dataclass
class QuestionsConfig(Settings):
    questions: Path  # VQAv2's zip file of questions
    answers: Path  # and of annotations
    captions: Path = Path("captions")  # JSON lines of image and caption, or a folder of such files
    llm: Text = "Qwen/Qwen2.5-7B-Instruct"  # any causal LM
    shots: Whole = 0  # solved examples before each question, of other images
    count: Count = 5_000  # questions
    seed: Seed = 0  # chooses them
    batch_size: Count = 32
    out: Path = Path("answers")


def normalize(answer: str) -> str:
    """As VQAv2 does before it compares: no capitals, punctuation or articles, number words as digits. Its table of contractions
    (dont is don't) is put otherwise: no apostrophes."""
    answer = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)|'", "", answer.lower())
    words = re.sub(r"[^\w\s.:%$&#*^~|]|_", " ", answer).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


def accuracy(answer: str, people: list[str]) -> float:
    """How well an answer agrees with those of ten people: min(matches / 3, 1), the mean over all sets of nine of them."""
    said, people = normalize(answer), [normalize(other) for other in people]
    matches = [sum(said == other for j, other in enumerate(people) if j != i) for i in range(len(people))]
    return sum(min(1, match / 3) for match in matches) / len(people)


def read_zip(path: Path, key: str) -> list[dict]:
    """The list under `key` of the JSON file in a zip file. Raises ValueError when there is none."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                values = json.loads(archive.read(name))
                if isinstance(values, dict) and isinstance(values.get(key), list):
                    return values[key]
    raise ValueError(f"{path} holds no JSON file with {key!r}: give VQAv2's zip file of {key.replace('annotations', 'annotations (answers)')}")


def choose(args: QuestionsConfig) -> tuple[list[dict], list[dict]]:
    """The questions, and the solved examples: {"id", "caption", "question", "answers", "answer": most people's, "type"}. Raises
    ValueError or OSError for what is missing."""
    captions = read_captions(args.captions)
    notes = {note["question_id"]: note for note in read_zip(args.answers, "annotations")}
    known = []
    for question in read_zip(args.questions, "questions"):
        caption, note = captions.get(f"COCO_val2014_{question['image_id']:012d}"), notes.get(question["question_id"])
        if caption is not None and note is not None:
            known.append(dict(id=question["question_id"], caption=caption, question=question["question"], type=note["answer_type"],
                              answers=[a["answer"] for a in note["answers"]], answer=note["multiple_choice_answer"]))  # fmt: skip
    if len(known) < args.count + args.shots:
        raise ValueError(f"there are {len(known):,} questions about the images of {args.captions}, and not {args.count + args.shots:,}:"
                         " caption more of them, or lower --count")  # fmt: skip
    known.sort(key=lambda question: hashlib.sha256(f"{args.seed} {question['id']}".encode()).digest())
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    same_as_before(args.out / "settings.json", dict(llm=args.llm, shots=args.shots, count=args.count, seed=args.seed, questions=digest),
                   "choose another --out")  # fmt: skip
    return known[: args.count], known[args.count : args.count + args.shots]


def ask(question: dict, with_answer: bool = False) -> str:
    answer = f" {question['answer']}\n\n" if with_answer else ""
    return f"An image: {question['caption']}\nQuestion: {question['question']}\nAnswer in one or two words:{answer}"


def answered(folder: Path) -> dict[int, str]:
    """{question id: answer} of all that was answered; a killed process leaves half a line."""
    answers = {}
    for file in sorted(folder.glob("answers*.jsonl")):
        for line in open(file, **TEXT):
            if line.endswith("\n"):
                record = json.loads(line)
                answers[record["id"]] = record["answer"]
    return answers


@torch.inference_mode()
def answer_all(args: QuestionsConfig, questions: list[dict], examples: list[dict], device: torch.device, file: Path, silent: bool):
    """Writes a line {"id", "answer"} for each question."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(AutoModelForCausalLM, args.llm, "language model (--llm)", dtype=dtype).to(device).eval()
    tokenizer = load(AutoTokenizer, args.llm, "language model's tokenizer (--llm)")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    beginning = "".join(ask(example, with_answer=True) for example in examples)
    file.write_bytes(file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1] if file.exists() else b"")  # no half a line
    with open(file, "a", **TEXT) as lines:
        for at in tqdm(range(0, len(questions), args.batch_size), unit=" batches", disable=silent):
            some = questions[at : at + args.batch_size]
            tokens = tokenizer([beginning + ask(question) for question in some], return_tensors="pt", padding=True).to(device)
            ids = model.generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=10, do_sample=False,
                                 pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            texts = tokenizer.batch_decode(ids[:, tokens.input_ids.shape[1] :], skip_special_tokens=True)
            for question, text in zip(some, texts):
                lines.write(json.dumps({"id": question["id"], "answer": (text.strip().splitlines() or [""])[0]}) + "\n")
            lines.flush()


def main(argv=None) -> None:
    args = parse_settings(QuestionsConfig, argv, __doc__)
    quiet()
    rank, world_size, device = share_work()
    try:
        questions, examples = gather(together(lambda: choose(args) if rank == 0 else None))[0]
    except (zipfile.BadZipFile, KeyError) as error:
        leave(f"error: {args.questions} and {args.answers} are not as VQAv2's are: {error!r}")
    done = gather(answered(args.out) if rank == 0 else None)[0]
    left = [question for question in questions if question["id"] not in done]
    together(lambda: answer_all(args, left[rank::world_size], examples, device, args.out / f"answers-{rank}.jsonl", rank > 0))
    if rank == 0:
        answers, scores = answered(args.out), defaultdict(list)
        for question in questions:
            for kind in ("all", question["type"]):
                scores[kind].append(accuracy(answers[question["id"]], question["answers"]))
        result = {kind: sum(values) / len(values) for kind, values in scores.items()}
        write_json(args.out / "accuracy.json", {"questions": len(questions), "shots": args.shots, "accuracy": result})
        print(f"{len(questions):,} questions, {args.shots} shots: " + ", ".join(f"{kind} {value:.2%}" for kind, value in result.items()))


if __name__ == "__main__":
    run(main, "stopped; the same command goes on")
