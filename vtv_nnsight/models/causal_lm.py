"""Causal language models of transformers under nnsight, whatever their family: Llama, Qwen, GPT-2, GPT-NeoX, Gemma, OPT
and all others of decoder layers with an attention and its output projection.

    >>> model = CausalLM("HuggingFaceTB/SmolLM2-135M")           # or a folder, or a .gguf file
    >>> with model.trace(prompts):                              # TextPrompts; strings and tokens, too
    ...     z = model.layers[3].self_attn.heads.save()          # [batch, token, head, head_dim]
    ...     logits = model.output.logits.save()                 # [batch, token, vocabulary]
    >>> with model.generate(prompts, max_new_tokens=4) as tracer:
    ...     ids = tracer.result.save()                          # [batch, token + at most 4]

Texts are padded on the left. Positions are counted from the end of the prompt: 0 is its last token. The tokens of an
answer that follows it (`model.trace(prompts, answers=True)`) have none, nor has padding.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nnsight import save
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from vtv_nnsight.models.canvas import drop_none
from vtv_nnsight.models.decoder_layers import find_added, find_layers
from vtv_nnsight.models.devices import floating_dtype
from vtv_nnsight.models.inside_trace import NONE, answer_loss, differ, first, first_tokens, followed, read
from vtv_nnsight.models.interface import GRANULARITIES, HEADS, InContextModel, Loss, Place, Stage
from vtv_nnsight.models.nnsight_compat import TraceableTexts, attention_envoy
from vtv_nnsight.models.nnsight_remote import PLAIN, SENDERS, check_remote
from vtv_nnsight.models.sites import place_of
from vtv_nnsight.models.sources import GGUF, HUB_OPTIONS, locate, naming
from vtv_nnsight.models.torch_files import StrPath
from vtv_nnsight.prompts import Prompts
from vtv_nnsight.text import check_choice
from vtv_nnsight.text_prompts import TextLayout, TextPrompts

CACHES = ("cache", "past_key_values")
"""Names of a forward's argument for the keys and values of earlier tokens, in the releases of transformers."""


class CausalLM(TraceableTexts, InContextModel):
    """A causal language model that can be traced. `model.layers` are its decoder layers; all modules keep their own
    names, too.

    | here | nnterp | TransformerLens |
    |---|---|---|
    | `model.layers[i].self_attn.heads` | `attention_head_outputs[i]` | `blocks.{i}.attn.hook_z` |
    | `model.layers[i].self_attn.pattern` | `attention_probabilities[i]` | `blocks.{i}.attn.hook_pattern` |
    | `model.outputs("layers", i)["attn"].output` | `attentions_output[i]` | `blocks.{i}.hook_attn_out` |
    | `model.outputs("layers", i)["mlp"].output` | `mlps_output[i]` | `blocks.{i}.hook_mlp_out` |
    | `model.layers[i].output` | `layers_output[i]` | `blocks.{i}.hook_resid_post` |

    `pattern` wants `attn_implementation="eager"`.

    Args:
        source: A Hub id, a folder that `save_pretrained` wrote, a .gguf file (unpacked when it is read, which takes its
            time: `save_pretrained` makes a folder of it), or a ready module of transformers'.
        tokenizer: Of a ready module; else that of the source.
        chat: Put prompts into the model's chat template, as what a user says.
        remote: Where a model runs of which only structure and tokenizer are loaded here: as for nnsight's `trace`,
            True, a host's address, or "local". It is then the default of what collects, searches and evaluates.
        **kwargs: As for transformers' `from_pretrained`: `revision`, `token`, `dtype`, `device_map`,
            `attn_implementation`, `quantization_config`, …; and nnsight's: `dispatch=True`, `rename`, `envoys`.

    Raises:
        TypeError, ValueError, OSError, ImportError: naming the source and what is wrong with it.
    """

    layout = TextLayout()
    scoring = {"answers": True}

    def __init__(
        self,
        source: StrPath | nn.Module,
        *,
        tokenizer: Any = None,
        chat: bool = False,
        remote: bool | str = False,
        envoys: Any = None,
        **kwargs: Any,
    ) -> None:
        name = type(source).__name__ if isinstance(source, nn.Module) else os.fspath(source)
        self.nameless = name if isinstance(source, nn.Module) or locate(source).kind != "hub" else None
        check_remote(remote, self.nameless)
        if isinstance(source, nn.Module) and not isinstance(getattr(source, "config", None), PretrainedConfig):
            raise TypeError(f"a {name} is no model of transformers'; give one, as LlamaForCausalLM.")
        floating_dtype(kwargs.get("dtype"))
        if isinstance(source, nn.Module) and tokenizer is None:
            raise TypeError(f"a {type(source).__name__} came without its tokenizer; give tokenizer= beside it.")
        if isinstance(source, PreTrainedModel) and (not source.can_generate() or source.config.is_encoder_decoder):
            raise ValueError(f"a {type(source).__name__} is no causal language model; give one, as LlamaForCausalLM.")
        self.chat, self.remote, self._envoys_of_heads = chat, remote, dict(envoys or {})
        self._padding, self._tokens, self._width = torch.zeros(1, dtype=torch.long), 0, 1
        if not isinstance(source, nn.Module):
            source, tokenizer = _located(os.fspath(source), tokenizer, kwargs)
        super().__init__(source, task="text-generation", tokenizer=tokenizer, envoys=self._envoys_of_heads, **kwargs)
        self.sent: TextPrompts | None = None
        self.after, sites = 0, (HEADS, *self._sites, "residual")
        at, layers = self._stage.at, range(self._stage.layers)
        self.places = {site: [place_of(self, at(site), layer) for layer in layers] for site in sites}
        if self.tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {name} has no padding token; set tokenizer.pad_token.")
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {name} has no chat template; leave chat=True out.")

    def trace(self, *inputs: Any, remote: bool | str = False, **kwargs: Any) -> Any:
        """As nnsight's; with `remote`, prompts travel as tokens."""
        if remote and kwargs.get("trace") is False:
            return self.interleave("trace", *inputs, remote=remote)
        if remote:
            self.sent = inputs[0] if inputs and isinstance(inputs[0], TextPrompts) else None
            ((inputs, kwargs),) = self.as_tokens([(inputs, kwargs)])
            self.after = self._width - 1
        return super().trace(*inputs, remote=remote, **kwargs)

    def adapt(self, module: Any) -> Any:
        """The module, in eval mode, once its layers and their heads are known."""
        self._path, self._attention, projection = find_layers(module)
        config = module.config.get_text_config()
        layer = module.get_submodule(f"{self._path}.0")
        attention = getattr(layer, self._attention)
        linear = getattr(attention, projection)
        width, heads = getattr(linear, "in_features", None) or linear.nx, config.num_attention_heads
        stream = None if width == config.hidden_size else config.hidden_size
        self._stage = Stage("layers", config.num_hidden_layers, heads, width // heads, stream=stream)
        self._sites = find_added(layer, self._attention, config)
        self._envoys_of_heads.setdefault(type(attention), attention_envoy(projection, heads))
        return module.eval()

    @property
    def layers(self) -> Any:
        """The envoys of the decoder layers."""
        return functools.reduce(getattr, self._path.split("."), self)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One, "layers"."""
        return (self._stage,)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """ "tokens": the mean cross-entropy of the answer's tokens; where prompts have wrong answers, too, how much
        likelier these are: the difference of their log-probabilities, at the first token where they differ."""
        return (Loss("tokens", lambda output, _, truth: answer_loss(output.logits, truth)),)

    def attention(self, stage: str, layer: int) -> Any:
        """The attention of a layer."""
        return getattr(self.layers[layer], self._attention)

    def outputs(self, stage: str, layer: int) -> dict[str, Any]:
        """What attention and MLP add to the residual stream, where that is a module's output, and the layer itself."""
        envoy = self.layers[layer]
        return {site: getattr(envoy, name) for site, name in self._sites.items()} | {"residual": envoy}

    def name_of(self, module: Any) -> str:
        """The name of a module as users type it, such as "layers.3.self_attn"."""
        return super().name_of(module).replace(f"{self._path}.", "layers.", 1)

    def positions(self, stage: str, prompts: TextPrompts | None = None) -> torch.Tensor:
        """From the end: LongTensor [token], or [batch, token] with -1 for padding where lengths differ."""
        if prompts is None:
            return _from_end(self._tokens, self._padding)
        lengths = self.lengths(prompts)
        return _from_end(int(lengths.max()), lengths.max() - lengths)

    def token_positions(self, stage: str, prompts: Any, place: Place) -> torch.Tensor:
        """Those of what is running, which is padded together."""
        tokens = first(read(place)).shape[1] - self._width + 1
        return _from_end(tokens, self._padding if tokens >= self._tokens else self._padding[:1] * 0)

    def groups(self, stage: str, granularity: str, layout: TextLayout | None = None) -> dict[str, torch.Tensor]:
        """The last tokens, one by one; for "head", all of them together."""
        check_choice(GRANULARITIES, granularity=granularity)
        places = (layout or self.layout).places
        return {"all tokens": torch.cat([*places.values()])} if granularity == "head" else places

    def lengths(self, prompts: TextPrompts | None = None) -> torch.Tensor:
        """The tokens of each prompt, without its answer: LongTensor [batch]."""
        return torch.tensor([1] if prompts is None else [len(ids) for ids in self.tokens(_texts(prompts))])

    def answer_lengths(self, prompts: TextPrompts) -> torch.Tensor:
        """The tokens of each true answer: LongTensor [batch]."""
        prompts.check_truth()
        return torch.tensor([len(ids) for ids in self.tokens(prompts.texts, prompts.answers)])

    def tokens(self, texts: Sequence[str], answers: Sequence[str] | None = None) -> list[list[int]]:
        """The tokens of texts, as prompts have them: with what the tokenizer or the chat template puts around them. Of
        answers that follow the texts, those of the answers.

        Raises:
            ValueError: when a text or an answer has no token.
        """
        if self.chat:
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            answers = answers and [answer.strip() for answer in answers]
        encode = functools.partial(self.tokenizer, add_special_tokens=not self.chat)
        ids: list[list[int]] = encode(list(texts)).input_ids
        if answers is not None:
            whole = encode([text + answer for text, answer in zip(texts, answers)]).input_ids
            alone = self.tokenizer(list(answers), add_special_tokens=False).input_ids
            ids = [
                both[len(text) :] if both[: len(text)] == text else answer
                for both, text, answer in zip(whole, ids, alone)
            ]
        if not all(ids):
            raise ValueError(f"{(answers or texts)[ids.index([])][-60:]!r} has no token; give another text.")
        self._check_length(max(map(len, ids), default=0))
        return ids

    def truth(self, prompts: TextPrompts) -> torch.Tensor:
        """The tokens of the true answers and of the wrong ones: LongTensor [batch, token, 2], -100 where there is
        none."""
        prompts.check_truth()
        right = self.tokens(prompts.texts, prompts.answers)
        wrong = self.tokens(prompts.texts, prompts.wrong_answers) if prompts.wrong_answers else [[] for _ in right]
        padded = pad_sequence([torch.tensor(ids) for ids in (*right, *wrong)], batch_first=True, padding_value=NONE)
        truth = torch.stack(padded.long().chunk(2), dim=-1)
        if prompts.wrong_answers and not (decided := differ(truth).any(1)).all():
            row = prompts[int(decided.int().argmin())]
            raise ValueError(f"of {row.answers} and {row.wrong_answers} one begins with the other; give others.")
        return truth

    def answers(
        self, output: Any, prompts: TextPrompts, task: Any = None, edit: Callable[[Any], None] | None = None
    ) -> tuple[Any, Any]:
        """By what the task's metric reads: "text", what the model says up to what ends an answer, and the true answers;
        or "logits" [batch, vocabulary] where the answer begins (where the wrong one first differs from it), and the
        true token and the wrong one there [batch, 1 or 2]."""
        truth = self.truth(prompts)
        if task is not None and task.metric.reads == "text":
            return self.say(prompts, truth.shape[1], edit), prompts.answers
        return first_tokens(output.logits, truth)

    def task_losses(self, task: Any) -> tuple[Loss, ...]:
        """The task's own, of the name of its metric, where that reads logits."""
        if task.metric.reads != "logits":
            return ()
        return (Loss(task.metric.name, lambda output, _, truth: task.loss(*first_tokens(output.logits, truth)), False),)

    def show(self, answers: Any) -> list[str]:
        """Answers for people: of logits, the likeliest token."""
        return self.tokenizer.batch_decode(answers.argmax(-1)[:, None]) if torch.is_tensor(answers) else list(answers)

    def identity(self) -> dict[str, Any]:
        """The architecture, whether prompts are chats, and whether texts begin with a beginning-of-sequence token."""
        begins = self.tokenizer("a").input_ids[:1]
        bos = self.tokenizer.bos_token_id is not None and begins == [self.tokenizer.bos_token_id]
        return super().identity() | {"architecture": self.network.config.model_type, "chat": self.chat, "bos": bos}

    def save_pretrained(self, folder: StrPath, **kwargs: Any) -> None:
        """Write a folder of weights and tokenizer that this class and transformers read, lazily; loads the weights
        first."""
        self.dispatch()
        self.network.save_pretrained(folder, **kwargs)
        self.tokenizer.save_pretrained(folder)

    def count_rows(self, *inputs: Any, **kwargs: Any) -> int:
        """Rows of one input set."""
        if inputs and isinstance(inputs[0], Prompts):
            return len(_texts(inputs[0]))
        return super().count_rows(*inputs, **kwargs)

    def as_tokens(self, invokes: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
        """The input sets of a trace with tokens for texts; with `answers`, the tokens of the answers but the last
        follow, and logits say what comes after the prompt and after each."""
        answered = [bool(options.get("answers")) for _, options in invokes]
        if len(set(answered)) > 1 or any(answered) and not all(isinstance(i[0], TextPrompts) for i, _ in invokes):
            raise ValueError("answers=True is for TextPrompts, and for all invokes of a trace or none.")
        follow = [
            self.tokens(inputs[0].texts, inputs[0].answers) if inputs[0].answers else [[NONE]] * len(inputs[0])
            for (inputs, _), wanted in zip(invokes, answered)
            if wanted
        ]
        self._width = max((len(ids) for part in follow for ids in part), default=1)
        rows: list[tuple[Any, dict[str, Any]]] = []
        for number, (inputs, options) in enumerate(invokes):
            options = {name: value for name, value in options.items() if name not in ("answers", "cached")}
            if inputs and isinstance(inputs[0], TextPrompts):
                ids = self.tokens(inputs[0].texts)
                if answered[number]:
                    ids, options = followed(ids, follow[number], self._width), options | self.scored(self._width)
                inputs, options = (), options | {"input_ids": ids}
            rows.append((inputs, options))
        return rows

    def seen(self, prompts: TextPrompts) -> dict[str, Any]:
        """Inputs of a forward of which activations alone are read."""
        return {"input_ids": self.tokens(prompts.texts)} | self.scored(1)

    def scored(self, width: int) -> dict[str, Any]:
        """Options of a forward of which the last `width` logits are read."""
        keeps = "logits_to_keep" in inspect.signature(type(self.network).forward).parameters
        return {"use_cache": False} | ({"logits_to_keep": width} if keeps else {})

    def join_inputs(self, invokes: list[tuple[Any, dict[str, Any]]], method: Any) -> tuple[Any, dict[str, Any]]:
        """The input sets of a trace as one forward's arguments, see `as_tokens`: texts are padded on the left."""
        rows = self.as_tokens(invokes)
        with unset_fake_temporarily():
            arguments, options = super().join_inputs(rows, method)
            mask = options.get("attention_mask")
            if mask is not None and not mask.any(1).all():
                raise ValueError(f"text {int(mask.any(1).int().argmin())} has no token; give each at least a word.")
            if mask is not None and not mask[:, -1].all():
                raise ValueError("these tokens are padded on the right; pad them on the left, or give texts.")
            self._check_length(0 if mask is None else int(mask.sum(1).max()))
            self._padding = torch.zeros(1, dtype=torch.long) if mask is None else mask.int().argmax(1).cpu()
            self._tokens = 0 if mask is None else mask.shape[1] - self._width + 1
        for _, given in invokes:
            if "cached" in given:
                options |= self._going_on(options, given["cached"], invokes[0][0][0].layout.positions)
        return arguments, options

    def _check_length(self, longest: int) -> None:
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most and longest > most:
            raise ValueError(f"a text has {longest} tokens with its answer; this model takes 1 to {most}.")

    @torch.no_grad()
    def cached(self, prompts: TextPrompts) -> list[torch.Tensor] | None:
        """The keys and values of each prompt's tokens but the last ones, those that vectors and sets hold: [layer * 2,
        head, token, head_dim]. None where layers differ in shape, and of a model that is edited or not here."""
        if self.is_edited or self.remote:
            return None
        self(prompts, cached=(past := DynamicCache()))  # which keeps all tokens, whatever the window of a layer
        layers: Any = past.layers
        values = [value for layer in layers for value in (layer.keys, layer.values)]
        if len(layers) != self._stage.layers or len({value.shape for value in values}) > 1:
            return None
        lengths, end = self.lengths(prompts).tolist(), -prompts.layout.positions
        return [torch.stack([value[row, :, -n:][:, :end] for value in values]) for row, n in enumerate(lengths)]

    def _going_on(self, options: dict[str, Any], known: Any, positions: int) -> dict[str, Any]:
        """Arguments of a forward that keeps keys and values, `known` being an empty cache; or goes on from those that
        `cached` gave of each row, and is given no tokens but the others."""
        name = next(name for name in CACHES if name in inspect.signature(type(self.network).forward).parameters)
        if isinstance(known, DynamicCache):
            return self.scored(1) | {name: known, "use_cache": True}
        before = max(0, self._tokens - positions)
        past = known[0].new_zeros(len(known[0]), len(known), known[0].shape[1], before, known[0].shape[3])
        for row, values in enumerate(known):
            past[:, row, :, before - values.shape[2] :] = values  # padded on the left, as the tokens are
        self._padding, self._tokens = (self._padding - before).clamp(min=0), self._tokens - before
        tokens = {key: options[key][:, before:] for key in ("input_ids", "position_ids") if key in options}
        return tokens | {name: DynamicCache(list(zip(past[0::2], past[1::2])))}

    def say(self, prompts: TextPrompts, most: int = 12, edit: Callable[[Any], None] | None = None) -> list[str]:
        """What the model says after prompts, up to what ends an answer, in a few tokens more than `most`; `edit` is
        called with the model inside the trace, as for a patch."""
        with self.generate(prompts, **self.saying(prompts, most)) as tracer:
            if edit is not None:
                edit(self)
            ids = save(tracer.result)
        return self.said(prompts, ids)

    def saying(self, prompts: TextPrompts, most: int) -> dict[str, Any]:
        """Options of `generate` for an answer of `most` tokens and what ends it."""
        stop = prompts.layout.stop
        most += len(self.tokenizer(stop, add_special_tokens=False).input_ids) if stop else 0
        if not len(prompts):
            raise ValueError("there are no prompts to answer; give at least one.")
        self._check_length(int(self.lengths(prompts).max()) + most)
        return {"max_new_tokens": most, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}

    def said(self, prompts: TextPrompts, ids: torch.Tensor) -> list[str]:
        """What generated tokens say after the prompts, up to what ends an answer."""
        stop, start = prompts.layout.stop, int(self.lengths(prompts).max())
        said = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [text.split(stop)[0] if stop else text for text in said]


PLAIN[TextPrompts] = lambda prompts: SENDERS[-1].tokens(prompts.texts)


def _located(source: str, tokenizer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """What nnsight reads, a folder, a Hub id or a ready module, and its tokenizer.

    Raises:
        ValueError, OSError, ImportError: naming the source, when it is no causal language model or cannot be read.
    """
    place = locate(source)
    asked = drop_none(options, "revision", "trust_remote_code", *HUB_OPTIONS)
    if place.kind == "file":
        if Path(source).suffix != GGUF:
            raise ValueError(f"{source!r} is no source of a CausalLM; give a Hub id, a folder or a {GGUF} file.")
        folder, name = str(Path(source).parent), Path(source).name
        if not Path(source).is_file():
            raise FileNotFoundError(f"there is no file {source}; check the path.")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, gguf_file=name)
        kept = {name: options.pop(name) for name in list(options) if name not in ("rename", "dispatch", "interleaver")}
        module: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **kept)
        module.hf_quantizer = None  # its weights are plain now, and can be saved
        vars(module.config).pop("quantization_config", None)
        return module, tokenizer
    with naming(source):
        config = AutoConfig.from_pretrained(place.path, **asked)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ValueError(f"{source!r} is a {config.model_type} model; expected a causal language model.")
    return place.path, tokenizer or AutoTokenizer.from_pretrained(place.path, **asked)


def _texts(prompts: Prompts) -> tuple[str, ...]:
    """The texts of prompts.

    Raises:
        TypeError: when they have none.
    """
    if not isinstance(prompts, TextPrompts):
        raise TypeError(f"a language model was given {type(prompts).__name__}; give TextPrompts, or texts.")
    return prompts.texts


def _from_end(tokens: int, padding: torch.Tensor) -> torch.Tensor:
    """Positions of so many tokens: [token], or [row, token] where the first `padding` [row] of a row have none."""
    with unset_fake_temporarily():
        seen = torch.arange(tokens - 1, -1, -1)
        return torch.where(seen < tokens - padding[:, None], seen, -1) if padding.any() else seen
