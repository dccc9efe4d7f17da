"""The lecture, slide by slide: what each claims, measured; the file and the function that show it; one page of it all.

    python lecture.py                            every claim, its number, and whether it holds; pictures in figures/
    python lecture.py attention                  the claims of one slide, with all their numbers
    python lecture.py --page                     lecture.html: claims, pictures and code beside each other
    python lecture.py --exercises                the backward passes to write yourself, by slide
    python lecture.py --exercise layers.rms_norm     one of them: the file without it, and the test that judges it
    python lecture.py --measure architectures    a long experiment, stored under results/
    python lecture.py --results                  RESULTS.md, the long tables, from what is stored

A claim is a function of lab/claims, and a slide names them, each with the function of the repository that it is about.
"""

from dataclasses import dataclass
from typing import NamedTuple

import architectures
import attention as attention_py
import bpe
import checkpoint
import cot
import evals
import finetune
import latent
import masks
import model as model_py
import moe
import posenc
import rlhf
import train
from engine import cli
from engine.cli import option
from engine.sandbox import run_program
from lab.claims import attention, evaluation, experts, models, positions, reasoning, tokenizer, training


class Slide(NamedTuple):
    """A slide: its title in the lecture, the files to read beside it, its claims, each with the function that it is
    about, and its formulas.
    """

    title: str
    files: str
    claims: dict
    formulas: tuple = ()


# fmt: off
SLIDES = {
    "llms": Slide("Large Language Models", "model.py layers.py mtp.py", {
        models.a_model_is_autoregressive: model_py.transformer,
        models.the_window_holds_prompt_and_answer: model_py.generate_batch,
    }, ["p(x_1 … x_n) = ∏_t p(x_t | x_1 … x_{t-1})"]),
    "types": Slide("Tipos de LLMs", "checkpoint.py", {
        models.an_open_model_is_a_folder: checkpoint.load,
        models.an_open_model_can_be_tuned: model_py.loss,
        models.a_large_model_needs_machines_of_its_own: architectures.costs,
    }),
    "evaluation": Slide("Evaluación de LLMs", "evals.py", {
        evaluation.blind_votes_become_ratings: evals.strengths,
        evaluation.a_puzzle_is_solved_exactly_or_not: evals.arc_score,
        evaluation.a_model_should_know_what_it_knows: evals.calibration_error,
        evaluation.programs_are_judged_by_their_tests: evals.pass_at_k,
        evaluation.hostile_programs_fail: run_program,
    }, ["P(i > j) = 1 / (1 + e^{s_j - s_i})", "pass@k = 1 - C(n - c, k) / C(n, k)"]),
    "tokenizer": Slide("Transformers actuales: Tokenizador", "bpe.py", {
        tokenizer.a_word_vocabulary_meets_unknown_words: bpe.encode_words,
        tokenizer.sub_words_and_bytes_know_every_word: bpe.textbook_encode,
        tokenizer.a_larger_vocabulary_makes_shorter_texts: bpe.textbook_learn,
        tokenizer.special_tokens_are_no_text: bpe.cutter,
        tokenizer.any_text_goes_in_and_comes_out: bpe.textbook_decode,
        tokenizer.the_data_set_decides_the_vocabulary: bpe.textbook_train,
    }),
    "positions": Slide("Transformers actuales: Codificación posicional", "posenc.py", {
        positions.counting_grows_and_sinusoidal_does_not: posenc.sinusoidal,
        positions.a_shift_is_one_linear_map: posenc.pair_frequencies,
        positions.fixed_positions_are_no_parameters: posenc.learned,
    }, ["PE[p, 2j] = sin(p / 10000^{2j / dim})", "PE[p, 2j+1] = cos(p / 10000^{2j / dim})"]),
    "rope": Slide("Codificación posicional: RoPE, ALiBi; solo decoder, caché KV", "posenc.py attention.py latent.py", {
        positions.rope_scores_depend_on_the_distance_only: posenc.textbook_rope,
        positions.alibi_is_a_straight_line: posenc.alibi,
        positions.alibi_goes_on_where_learned_positions_fail: posenc.alibi_slopes,
        positions.rope_is_stretched_at_its_slow_pairs: posenc.rope_frequencies,
        attention.a_cache_gives_the_same_for_less: attention_py.KVCache,
        attention.sharing_and_latents_make_the_cache_small: latent.absorbed_attention,
    }, ["⟨R(m) q, R(n) k⟩ = ⟨q, R(n - m) k⟩", "scores = {q k^T} / √{dim} - slope · |i - j|"]),
    "attention": Slide("Transformers actuales: Variantes de atención", "attention.py masks.py", {
        attention.full_attention_is_quadratic: attention_py.attention,
        attention.a_trained_model_attends_to_what_it_needs: attention_py.self_attention,
        attention.sparse_attention_is_cheaper: masks.strided,
        attention.sparse_patterns_are_fixed_windows_or_random: masks.bigbird,
        attention.sparse_attention_is_faster: masks.window,
        attention.flash_attention_is_exact: attention_py.textbook_flash_attention,
        attention.flash_attention_needs_linear_memory: attention_py.flash_attention,
        attention.flash_attention_moves_fewer_bytes: attention_py.flash_attention,
    }, ["attention(q, k, v) = softmax({q k^T} / √{dim}) v", "O = Σ_j e^{S_j - m} v_j", "ℓ = Σ_j e^{S_j - m}"]),
    "experts": Slide("Transformers actuales: Mixture of Experts (MoE)", "moe.py", {
        experts.more_experts_cost_a_token_no_more: moe.chosen_experts,
        experts.a_router_left_alone_prefers_some_experts: moe.route,
        experts.balancing_spreads_the_load: moe.load_balancing_loss,
    }, ["y = Σ_{i ∈ T} g_i expert_i(x)", "g_i = s_i / Σ_{j ∈ T} s_j", "s = softmax(W x)"]),
    "models": Slide("Transformers actuales: los seis", "architectures.py model.py", {
        models.one_model_is_all_six: model_py.block,
        models.the_six_use_what_they_need: model_py.feed_forward,
        models.the_six_learn_from_the_same_text: train.train,
    }, ["x = x + attention(norm(x))", "x = x + feed_forward(norm(x))"]),
    "training": Slide("Proceso de entrenamiento: pre-entrenamiento", "train.py optim.py", {
        training.a_text_is_its_own_answer: train.causal,
        training.a_gap_is_filled_from_both_sides: train.masked,
    }, ["loss = - 1 / n · Σ_t log p(x_t | x_1 … x_{t-1})"]),
    "instruct": Slide("Fine tuning: modelos instruct", "finetune.py", {
        training.an_instruct_model_follows_instructions: finetune.pack,
        training.only_the_answer_is_learned: finetune.encode,
    }, ["W' = W + α / r · B A"]),
    "rlhf": Slide("Fine tuning: RLHF", "rlhf.py", {
        training.a_reward_model_learns_what_is_preferred: rlhf.bradley_terry,
        training.feedback_makes_answers_more_useful: rlhf.ppo,
        training.feedback_makes_answers_more_honest: rlhf.dpo,
        training.feedback_makes_answers_safer: rlhf.grpo,
        training.tuned_answers_win: rlhf.rewards,
    }, ["P(a > b) = 1 / (1 + e^{r_b - r_a})"]),
    "reasoning": Slide("Razonamiento", "cot.py", {
        reasoning.steps_before_the_answer_solve_more: cot.train,
        reasoning.a_quick_answer_is_for_easy_problems: cot.written,
        reasoning.harder_problems_take_longer: cot.forced,
    }),
}
# fmt: on


@dataclass(frozen=True)
class Settings:
    """What to show."""

    slide: str | None = option(None, "a slide's claims alone", choices=list(SLIDES), positional=True, nargs="?")
    page: bool = option(False, "write lecture.html")
    seed: int = option(0, "of all that is drawn", least=0)
    exercises: bool = option(False, "list the exercises, by slide")
    exercise: str | None = option(None, "write an exercise, such as layers.rms_norm", metavar="FILE.FUNCTION")
    forward: bool = option(False, "of --exercise: take out the forward pass, not the backward pass")
    measure: str | None = option(None, "a long experiment, stored under results/", choices=["architectures"])
    steps: int | None = option(None, "of --measure: so many steps of each training, instead of a minute", least=1)
    results: bool = option(False, "write RESULTS.md from the stored results")


def main(argv=None):
    from lab import exercises, page, show, tables

    s = cli.settings(Settings, argv, "The lecture's claims, measured.")
    if s.exercises:
        return exercises.show(SLIDES)
    if s.exercise:
        return exercises.write(s.exercise, s.forward)
    if s.measure:
        return tables.measure_architectures(s.steps, s.seed)
    if s.results:
        return tables.write()
    found = show.run(SLIDES, s.slide, s.seed)
    if s.page:
        page.write(SLIDES, found, s.slide)


if __name__ == "__main__":
    cli.run(main)
