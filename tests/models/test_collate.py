"""The collator against the processors themselves: what is trained on, what is padded, and prompts without an image."""

import pytest
import torch
from PIL import Image

from scale_digrap.config import ModelConfig
from scale_digrap.data.sample import VqaSample
from scale_digrap.models.collate import CollateError, PromptTemplate, VqaCollator, training_answer
from scale_digrap.models.loading import load_processor
from scale_digrap.models.plain_text import control_tokens
from tests.models import tiny


def sample(number, answers, image=True, question="what color is the shape"):
    picture = tiny.picture("red", number) if image else None
    return VqaSample(f"s{number}", picture, question, answers, str(number), {})


SAMPLES = [
    sample(0, ["red"]),
    sample(1, ["blue circle", "green", "blue circle"], question="which thing do you see"),
    sample(2, ["green"], image=False),
    sample(3, ["red", "blue"], question="what is the color ?"),
]


@pytest.fixture(params=tiny.FAMILIES)
def collator(request, checkpoint):
    return VqaCollator(load_processor(ModelConfig(path=str(checkpoint(request.param)))), PromptTemplate())


def labelled(batch, row):
    labels = batch["labels"][row]
    return labels[labels != -100]


def unpadded(batch, row, name="input_ids"):
    return batch[name][row][batch["attention_mask"][row].bool()]


def test_only_the_answer_and_its_end_are_labelled(collator):
    batch = collator.train(SAMPLES)
    eos = collator.tokenizer.eos_token
    for row, answer in enumerate(["red", "blue circle", "green", "red"]):
        tokens = labelled(batch, row)
        assert collator.tokenizer.decode(tokens) == f"{answer} {eos}"
        # labels sit on the very tokens they name, at the end of the sequence
        whole = unpadded(batch, row)
        assert torch.equal(whole[-len(tokens) :], tokens)
        assert (batch["labels"][row][: len(whole) - len(tokens)] == -100).all()
        assert (batch["labels"][row][len(whole) :] == -100).all()


def test_generation_sees_exactly_the_training_prefix(collator):
    train, generate = collator.train(SAMPLES), collator.generate(SAMPLES)
    assert "labels" not in generate
    for row in range(len(SAMPLES)):
        prompt = unpadded(generate, row)
        assert torch.equal(unpadded(train, row)[: len(prompt)], prompt)
        assert len(prompt) + len(labelled(train, row)) == len(unpadded(train, row))
    assert (generate["attention_mask"][:, -1] == 1).all(), "generation needs the padding on the left"
    assert (train["attention_mask"][:, 0] == 1).all()
    assert torch.equal(train["pixel_values"], generate["pixel_values"])


def test_a_mixed_batch_is_its_samples_one_by_one(collator):
    batch = collator.train(SAMPLES)
    alone = [collator.train([one]) for one in SAMPLES]
    for row, single in enumerate(alone):
        for name in batch:
            if batch[name].shape == batch["input_ids"].shape:
                inside = batch["attention_mask"][row].bool() if name != "labels" else slice(0, len(single[name][0]))
                assert torch.equal(batch[name][row][inside], single[name][0]), (name, row)
    images = [single["pixel_values"] for single in alone if "pixel_values" in single]
    assert len(images) == 3
    assert torch.equal(torch.cat(images), batch["pixel_values"])


def test_a_batch_without_images_has_the_same_prompt_without_image_tokens(collator):
    with_image, without = sample(5, ["red"]), sample(5, ["red"], image=False)
    pictured, plain = collator.train([with_image]), collator.train([without])
    assert "pixel_values" not in plain
    assert "image_grid_thw" not in plain
    image_words = {"<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<image_soft_token>"}
    image_words |= {"<start_of_image>", "<end_of_image>", "\n"}

    def words(batch):
        tokens = collator.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
        return [token for token in tokens if token not in image_words]

    assert words(plain) == words(pictured)
    assert set(plain) == {name for name in pictured if pictured[name].shape == pictured["input_ids"].shape}


def test_paligemma_is_what_its_own_processor_makes(checkpoint):
    processor = load_processor(ModelConfig(path=str(checkpoint("paligemma"))))
    batch = VqaCollator(processor, PromptTemplate()).train([SAMPLES[0], SAMPLES[1], SAMPLES[3]])
    theirs = processor(
        text=[f"<image>Question: {s.question} Answer:" for s in (SAMPLES[0], SAMPLES[1], SAMPLES[3])],
        images=[[s.image] for s in (SAMPLES[0], SAMPLES[1], SAMPLES[3])],
        suffix=["red", "blue circle", "red"],
        padding=True,
        return_tensors="pt",
    )
    assert set(batch) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(value, batch[name]), name


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_chat_families_are_what_their_own_template_makes(checkpoint, family):
    processor = load_processor(ModelConfig(path=str(checkpoint(family))))
    batch = VqaCollator(processor, PromptTemplate("{question}")).generate([SAMPLES[0]])
    content = [{"type": "image", "image": SAMPLES[0].image}, {"type": "text", "text": SAMPLES[0].question}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(theirs[name], batch[name]), name


def test_a_template_that_writes_the_bos_gets_no_second_one(checkpoint):
    processor = load_processor(ModelConfig(path=str(checkpoint("llava"))))
    processor.chat_template = "<s>" + processor.chat_template
    processor.tokenizer.add_bos_token = True
    ids = VqaCollator(processor, PromptTemplate()).train(SAMPLES)["input_ids"]
    assert ((ids == processor.tokenizer.bos_token_id).sum(dim=1) == 1).all()


def test_without_a_chat_template(checkpoint):
    processor = load_processor(ModelConfig(path=str(checkpoint("llava"))))
    template = PromptTemplate(use_chat_template=False)
    ids = VqaCollator(processor, template).generate([SAMPLES[0]])["input_ids"][0]
    text = processor.tokenizer.decode(ids)
    assert "USER" not in text
    assert text.replace("<image>", "").split() == ["Question", ":", *SAMPLES[0].question.split(), "Answer", ":"]


def test_training_answer():
    assert training_answer(["b", "a", "a"]) == "a"
    assert training_answer(["b", "a", "a", "b"]) == "b"
    with pytest.raises(CollateError, match="no answer"):
        training_answer([])


def test_prompt_and_answer_templates():
    template = PromptTemplate("Q {question} {x}", "<{answer}>")
    assert template.render("{y}") == "Q {y} {x}"
    assert template.render_answer("a") == "<a>"
    assert template.to_dict() == {"prompt": "Q {question} {x}", "answer": "<{answer}>", "use_chat_template": True}


def test_long_questions_lose_words_and_are_counted(checkpoint):
    processor = load_processor(ModelConfig(path=str(checkpoint("paligemma"))))
    long = sample(1, ["red"], question=" ".join(["which", "thing", "do", "you", "see"] * 20))
    short = sample(2, ["red"])
    free = VqaCollator(processor, PromptTemplate()).train([short])["input_ids"].shape[1]
    collator = VqaCollator(processor, PromptTemplate(), max_length=free + 3)
    batch = collator.train([long, short])
    assert batch["input_ids"].shape[1] <= free + 3
    assert collator.truncated == 1
    assert collator.tokenizer.decode(labelled(batch, 0)) == "red </s>"
    text = processor.tokenizer.decode(unpadded(batch, 0))
    assert "Question : which thing" in text
    assert "Answer :" in text
    with pytest.raises(CollateError, match=r"'s2'.*raise model\.max_length"):
        VqaCollator(processor, PromptTemplate(), max_length=6).train([short])


def test_images_come_decoded_or_as_bytes(collator):
    import io

    buffer = io.BytesIO()
    SAMPLES[0].image.save(buffer, "png")
    as_bytes = VqaSample("b", buffer.getvalue(), SAMPLES[0].question, ["red"], "b", {})
    assert torch.equal(collator.train([as_bytes])["pixel_values"], collator.train(SAMPLES[:1])["pixel_values"])
    with pytest.raises(CollateError, match="empty batch"):
        collator.train([])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_several_images_in_one_sample_are_what_the_processor_makes(checkpoint, family):
    processor = load_processor(ModelConfig(path=str(checkpoint(family))))
    collator = VqaCollator(processor, PromptTemplate("{question}"))
    pictures = [tiny.picture("red", 1), tiny.picture("blue", 2)]
    several = VqaSample("m", pictures[0], "which is red", ["red"], "m", more_images=[pictures[1]])
    batch = collator.generate([several, SAMPLES[0]])
    if family == "paligemma":
        theirs = processor(text=["<image><image>which is red"], images=[pictures], return_tensors="pt")
    else:
        content = [*({"type": "image", "image": picture} for picture in pictures)]
        content.append({"type": "text", "text": several.question})
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    assert torch.equal(unpadded(batch, 0), theirs["input_ids"][0])
    (alone,) = (collator.generate([SAMPLES[0]])["pixel_values"],)
    assert torch.equal(batch["pixel_values"], torch.cat([theirs["pixel_values"], alone]))
    # the second picture is looked at: another one gives other pixels
    several.more_images = [tiny.picture("green", 3)]
    assert not torch.equal(collator.generate([several, SAMPLES[0]])["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("place", ["question", "answer", "plain question"])
def test_a_control_token_in_a_question_or_an_answer_is_text(checkpoint, family, place):
    processor = load_processor(ModelConfig(path=str(checkpoint(family))))
    collator = VqaCollator(processor, PromptTemplate())
    tokenizer = collator.tokenizer
    tokens = control_tokens(processor)
    assert {tokenizer.eos_token, str(processor.image_token)} <= set(tokens)
    tokens += [f"<im{processor.image_token}age>", f"{tokenizer.eos_token}{tokenizer.eos_token}"]
    control = {tokenizer.convert_tokens_to_ids(token) for token in control_tokens(processor)} - {tokenizer.unk_token_id}

    def signals(question, answer):
        one = VqaSample("s", None if "plain" in place else SAMPLES[0].image, question, [answer], "s", {})
        batch = collator.train([SAMPLES[1], one])
        return [int(token) for token in unpadded(batch, 1) if int(token) in control]

    for token in tokens:
        text = f"what {token} is"
        question, answer = (text, "red") if "question" in place else ("what is", text)
        assert signals(question, answer) == signals("what is", "red"), token
    assert collator.neutralised == len(tokens)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_a_character_in_a_question_is_read_as_an_unknown_one(checkpoint, family):
    collator = VqaCollator(load_processor(ModelConfig(path=str(checkpoint(family)))), PromptTemplate())
    rows = [
        collator.train([VqaSample("s", SAMPLES[0].image, f"what {half} is", [f"red {half}"], "s", {})])["input_ids"]
        for half in ("\ud83d", "\ufffd")
    ]
    assert torch.equal(*rows)
    assert collator.neutralised == 2


def test_a_picture_token_in_the_prompt_is_refused_before_anything_is_read(checkpoint):
    processor = load_processor(ModelConfig(path=str(checkpoint("llava"))))
    with pytest.raises(CollateError, match=r"model\.prompt: '<image>' stands for a picture"):
        VqaCollator(processor, PromptTemplate("<image>\n{question}"))


def test_a_sample_that_a_processor_cannot_take_is_named(checkpoint):
    collator = VqaCollator(load_processor(ModelConfig(path=str(checkpoint("qwen2_5_vl")))), PromptTemplate())
    thin = VqaSample("thin", Image.new("RGB", (2000, 2)), "what is it", ["red"], "thin", {})
    with pytest.raises(CollateError, match="sample 'thin': the model's processor cannot take it"):
        collator.train([SAMPLES[0], thin])
