"""Tasks of lm-evaluation-harness, asked of models here.

`plan.py`, `likelihood.py` and `continuation.py` answer the harness's questions and do not know it; `language_model.py`
is its model, `tasks.py` opens its tasks, `mmlu.py` has those over local files, `results.py` reads what was found. The
package `lm_eval` is optional: what needs it imports it only when it is used.
"""
