"""Which data a recipe names: where it lies, which columns matter, and how much of it is used."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

_JOINED = "labels"  # the column that several label columns become


class DataSettings(BaseModel):
    """Where the data is, which columns matter, and how much of it to use.

    Args:
        name: A data set on the Hub, a local folder (``train.parquet``, ``validation.parquet`` …; also csv, tsv, json,
            jsonl, txt; or a folder of images or sounds for each class; or sounds with a ``metadata.csv`` that has
            ``file_name`` and ``text``), a local file, or ``"digits"`` (splits train and test, columns image and label;
            no downloads).
        config: Configuration on the Hub (``"sst2"`` of ``nyu-mll/glue``).
        files: Instead of `name`: split -> one or several local files.
        train: The split to train on.
        evaluation: The splits to evaluate on, taken together.
        test_size: For a source with one split: the fraction of `train`, in (0, 1), held out instead of `evaluation`;
            stratified where the label is a class, and the same rows in every run.
        text: The column with the text, or two columns for pairs (question and context, for question answering); for
            token classification the column with the list of words.
        image: The column with images, or with arrays in [0, 1].
        audio: The column with sounds: wav files, or what soundfile reads (extra ``audio``).
        label: The column with the label: a class (number or string; numbers that do not count from
            0, such as stars, are names of classes), or a float for regression; a list of them for
            tokens, and where a row has several classes, for which also a list of 0 and 1, or several columns of them
            may be named; a text to write, for seq2seq, or that was said; answers as in SQuAD. Language models need
            none.
        full_score: For sentence-similarity: the score of two sentences that mean the same, 5 in STS-B; cosines learn
            score / full_score.
        language: For speech-recognition by a model of many languages, such as Whisper: what is spoken (``"english"``).
        max_length: Tokens per row at most.
        max_seconds: Of a sound at most: longer ones are cut, and where their text is learned left out.
        train_limit: Train on so many rows at most, drawn at random.
        train_seed: Seed of that draw.
    """

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    config: str | None = None
    files: dict[str, str | list[str]] | None = None
    train: str = "train"
    evaluation: list[str] = Field(default=["validation"], min_length=1)
    test_size: float | None = Field(default=None, gt=0, lt=1)
    text: str | list[str] | None = None
    image: str | None = None
    audio: str | None = None
    label: str | list[str] = "label"
    full_score: float = Field(default=1.0, gt=0)
    language: str | None = None
    max_length: int = Field(default=128, ge=1)
    max_seconds: float = Field(default=30.0, gt=0)
    train_limit: int | None = Field(default=None, ge=1)
    train_seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way_only(self) -> DataSettings:
        if (self.name is None) == (self.files is None):
            raise ValueError(
                "give either name, of a file, a folder or a data set on the Hub, or files, those of each split. "
                f"Received: name={self.name!r}, files={self.files!r}"
            )
        if self.test_size is not None and "evaluation" in self.model_fields_set:
            raise ValueError("give either evaluation (splits) or test_size (a part of train), not both")
        if isinstance(self.text, list) and len(self.text) not in (1, 2):
            raise ValueError(f"text must be one column or a pair of columns. Received: {self.text}")
        if self.label == []:
            raise ValueError("label must name a column, or several. Received: none")
        return self

    @property
    def texts(self) -> list[str]:
        """The text columns as a list."""
        return [self.text] if isinstance(self.text, str) else self.text or []

    @property
    def label_columns(self) -> list[str]:
        """The label columns as a list."""
        return [self.label] if isinstance(self.label, str) else self.label

    @property
    def label_column(self) -> str:
        """The column that holds the label once data is loaded."""
        return self.label if isinstance(self.label, str) else _JOINED
