//! DeepSeek-V3.2's format, as its published encoder defines it. Thinking is off unless the request turns it on.

use super::{
    ASSISTANT, BOS, END_THINK, EOS, Message, THINK, USER, dsml, last_user, schemas, thinking_of, tools_of,
};
use crate::{ChatInput, Error};

pub(super) fn render(mut messages: Vec<Message>, input: &ChatInput) -> Result<String, Error> {
    let thinking = thinking_of(input).unwrap_or(false);
    let tools = tools_of(input);
    if !tools.is_empty() {
        messages.insert(0, Message { role: "system".to_owned(), tools, ..Message::default() });
    }
    // Earlier reasoning is dropped if the last word is the user's; between tool calls it stays.
    if thinking && messages.last().is_some_and(|message| message.role == "user") {
        drop_reasoning(&mut messages);
    }
    let last_user = last_user(&messages);
    let mut prompt = BOS.to_owned();
    for at in 0..messages.len() {
        render_message(&mut prompt, &messages, at, Turn { thinking, last_user })?;
    }
    Ok(prompt)
}

/// What a message's form depends on beside itself.
#[derive(Clone, Copy)]
struct Turn {
    thinking: bool,
    last_user: Option<usize>,
}

/// Removes reasoning before the last user message.
fn drop_reasoning(messages: &mut [Message]) {
    let last_user = last_user(messages).unwrap_or(0);
    for message in &mut messages[..last_user] {
        message.reasoning.clear();
    }
}

fn render_message(prompt: &mut String, messages: &[Message], at: usize, turn: Turn) -> Result<(), Error> {
    let message = &messages[at];
    let Turn { thinking, last_user } = turn;
    let tag = |open: bool| if open && thinking { THINK } else { END_THINK };
    match message.role.as_str() {
        "system" => {
            prompt.push_str(&message.content);
            prompt.push_str(&message.appendix(tools_text));
        }
        "developer" => {
            if message.content.is_empty() {
                return Err(message.refuse("a developer message needs content"));
            }
            prompt.push_str(USER);
            prompt.push_str(&message.appendix(tools_text));
            prompt.push_str(&format!("\n\n# The user's message is: {}{ASSISTANT}", message.content));
            prompt.push_str(tag(Some(at) == last_user));
        }
        "user" => {
            prompt.push_str(&format!("{USER}{}{ASSISTANT}", message.content));
            prompt.push_str(tag(Some(at) == last_user));
        }
        "tool" => {
            let order = messages[..at].iter().rev().take_while(|earlier| earlier.role == "tool").count() + 1;
            let calls = at.checked_sub(order).map(|assistant| &messages[assistant]);
            let n_calls = calls
                .filter(|earlier| earlier.role == "assistant")
                .map_or(0, |earlier| earlier.tool_calls.len());
            if n_calls < order {
                return Err(message.refuse("a tool result without a tool call before it"));
            }
            if order == 1 {
                prompt.push_str("\n\n<function_results>");
            }
            prompt.push_str(&format!("\n<result>{}</result>", message.content));
            if order == n_calls {
                prompt.push_str("\n</function_results>\n\n");
                prompt.push_str(tag(last_user.is_none_or(|last| at >= last)));
            }
        }
        "assistant" => {
            let is_open = message.is_open && message.tool_calls.is_empty();
            if thinking && last_user.is_none_or(|last| at > last) {
                if message.reasoning.is_empty() && message.tool_calls.is_empty() {
                    return Err(message.refuse(
                        "in thinking mode it needs reasoning or tool calls behind the last user message",
                    ));
                }
                // What the answer is to continue is content: the encoder puts no reasoning before it.
                if !is_open {
                    prompt.push_str(&message.reasoning);
                    prompt.push_str(END_THINK);
                }
            }
            prompt.push_str(&message.content);
            if !message.tool_calls.is_empty() {
                prompt.push_str("\n\n");
                prompt.push_str(&dsml(&message.tool_calls, "function_calls"));
            }
            if !is_open {
                prompt.push_str(EOS);
            }
        }
        _ => return Err(message.refuse("unknown role")),
    }
    Ok(())
}

fn tools_text(tools: &[serde_json::Value]) -> String {
    format!(
        r#"## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:
<｜DSML｜function_calls>
...
</｜DSML｜function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
{}
</functions>
"#,
        schemas(tools)
    )
}
